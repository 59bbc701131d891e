"""What weights are, told from the records that lie below a folder."""

from pipelines.lineage.archive import Archive, Measured, Record
from pipelines.lineage.family import Lineage, Making, Model, Parent, lineage

__all__ = ["Archive", "Lineage", "Making", "Measured", "Model", "Parent", "Record", "lineage"]
