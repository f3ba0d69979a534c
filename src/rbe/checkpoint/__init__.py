"""A compressed folder on disk: shards, index with checksums, configuration; written as a stream and read lazily.

    config.json                         quantization_config says how the seeds of every module are to be read
    model-00001-of-0000N.safetensors    <module>.seeds, .scale, .row_scale, and the tensors that were kept
    model.safetensors.index.json        which tensor is where; under metadata.rbe every checksum

The index has a checksum of itself, of every shard as a whole, of every tensor (name, dtype, shape, bytes), of every
copied file and of the configuration.
"""

from rbe.checkpoint.check import Row, Verification, inspect, measured_error, verify
from rbe.checkpoint.folder import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    METHOD,
    RENAMED,
    Folder,
    as_matrix,
    check_files,
    expected,
    guard_names,
    has_checksums,
    is_ours,
    load_matrices,
    open_tensors,
    read_config,
    read_index,
    specs,
    strangers,
    weight_name,
    weight_sides,
)
from rbe.checkpoint.streams import STREAMS, dense, forms, names
from rbe.checkpoint.write import Contents, Module, cut, read_fingerprint, seal, write_fingerprint, write_folder
from rbe.nn.streams import Form

__all__ = [
    "CARD",
    "CONFIG",
    "FORMAT_VERSION",
    "METHOD",
    "RENAMED",
    "STREAMS",
    "Contents",
    "Folder",
    "Form",
    "Module",
    "Row",
    "Verification",
    "as_matrix",
    "check_files",
    "cut",
    "dense",
    "expected",
    "forms",
    "guard_names",
    "has_checksums",
    "inspect",
    "is_ours",
    "load_matrices",
    "measured_error",
    "names",
    "open_tensors",
    "read_config",
    "read_fingerprint",
    "read_index",
    "seal",
    "specs",
    "strangers",
    "verify",
    "weight_name",
    "weight_sides",
    "write_fingerprint",
    "write_folder",
]
