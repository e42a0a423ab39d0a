"""The dataset check: problems of an annotated folder, an HTML page about them, and a cleaned copy."""

from ..data.findings import KINDS
from .clean import write_clean_copy
from .findings_page import write_page
from .full_check import check_dataset

__all__ = ["KINDS", "check_dataset", "write_clean_copy", "write_page"]
