"""The dataset check: problems of an annotated folder, an HTML page about them, and a cleaned copy; and annotations that
a model contradicts."""

from ..data.findings import KINDS
from .clean import write_clean_copy
from .findings_page import write_page
from .full_check import CheckResult, check_dataset
from .label_errors import KINDS as LABEL_ERRORS
from .label_errors import LabelError, find_label_errors
from .label_errors_files import as_records, write_coco_suggestions, write_label_errors_page, write_label_studio

__all__ = [
    "KINDS",
    "LABEL_ERRORS",
    "CheckResult",
    "LabelError",
    "as_records",
    "check_dataset",
    "find_label_errors",
    "write_clean_copy",
    "write_coco_suggestions",
    "write_label_errors_page",
    "write_label_studio",
    "write_page",
]
