"""The doctor: what is wrong with an annotated folder, a page about it, and a cleaned copy."""

from ..data.checks import KINDS, Finding
from .clean import write_clean_copy
from .examine import Examination, examine
from .findings_page import write_report

__all__ = ["KINDS", "Examination", "Finding", "examine", "write_clean_copy", "write_report"]
