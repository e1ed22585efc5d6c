"""Plans that divide a model among devices, and what runs them."""
