"""The numbers alone: stages for items in a row, whatever the items and the devices are."""
