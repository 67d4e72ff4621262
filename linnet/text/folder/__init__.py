"""A folder of source code or documents as one prompt."""

from linnet.text.folder.packing import Order, PackedFile, PackedFolder, SkippedFile, pack_folder
from linnet.text.folder.prompt import frame_documents

__all__ = [
    "Order",
    "PackedFile",
    "PackedFolder",
    "SkippedFile",
    "frame_documents",
    "pack_folder",
]
