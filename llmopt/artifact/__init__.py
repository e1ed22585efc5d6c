"""The artifact folder: it appears whole or not at all, and its manifest says what made it and what it holds."""

from llmopt.artifact.files import check_free_disk, to_json_text, write_json, write_text
from llmopt.artifact.journal import Journal, Resume, discard_journal, journal, journal_bytes, journal_folder
from llmopt.artifact.manifest import (
    MANIFEST,
    MODEL_CARD,
    REPORT,
    SCHEMA,
    FileEntry,
    Manifest,
    Source,
    load_manifest,
    read_manifest,
    write_manifest,
)
from llmopt.artifact.staging import check_destination, staged

__all__ = [
    "MANIFEST",
    "MODEL_CARD",
    "REPORT",
    "SCHEMA",
    "FileEntry",
    "Journal",
    "Manifest",
    "Resume",
    "Source",
    "check_destination",
    "check_free_disk",
    "discard_journal",
    "journal",
    "journal_bytes",
    "journal_folder",
    "load_manifest",
    "read_manifest",
    "staged",
    "to_json_text",
    "write_json",
    "write_manifest",
    "write_text",
]
