"""ONNX files, in: a table from operators to torch functions, traced by `torch.export` into the graph a .pt2 gives.

`reading` (a hostile file to a parsed message) → `behind` (what ends a network untrained is taken off) → `normalising`
(functions inlined, names unique) → `outside` (operators that only ONNX Runtime knows, on constants) → `unpacking`
(recurrent layers get torch's weights) → `parameters` (which constants are weights) → `folding` (what is known is
computed) → `keeping` (what only ONNX Runtime knows, on data) → `running` (each node by the `table`, filled by
`operators`) → `importing` (the trace, as a `Program`). `batch` frees a fixed batch size.
"""

from worker.compression.formats.onnx.fixing import InputsToFix
from worker.compression.formats.onnx.importing import read_onnx

__all__ = ["InputsToFix", "read_onnx"]
