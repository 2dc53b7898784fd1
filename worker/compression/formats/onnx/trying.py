"""What lies behind the network, tried out: it stays in the file that is written, so ONNX Runtime has to be able to run
it.

What is found here while a file is read would otherwise end a job when everything is trained.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from worker.compression.errors import UnsupportedModel
from worker.compression.formats.exporting import quiet
from worker.compression.formats.onnx.graph import DTYPES, Node
from worker.compression.formats.onnx.labels import names_of
from worker.compression.formats.onnx.outside import IR_VERSION
from worker.compression.formats.onnx.running import title
from worker.compression.formats.onnx.schemas import ONNX_DOMAINS
from worker.compression.formats.program import Behind, Program
from worker.compression.formats.verification import as_numpy, silent_options

SECONDS = 5.0
"""For three samples."""
TOO_LARGE = ("allocate memory", "bad_alloc", "Failed to allocate", "not enough memory")
HINT = "Export the network without them: what decodes results belongs outside of it."


def refuse_unknown(behind: Behind) -> None:
    """Raises `UnsupportedModel` with every operator behind the network that ONNX Runtime does not have."""
    unknown: dict[str, None] = {}
    for proto in _all_nodes(onnx.GraphProto.FromString(behind.graph)):
        domain = _domain(proto.domain)
        opset = behind.opsets.get(domain, 1)
        if not is_known(domain, proto.op_type, opset):
            unknown[title(Node(proto.op_type, [], [], {}, opset, domain))] = None
    if unknown:
        raise UnsupportedModel(
            f"The model uses operators that are not supported: {', '.join(sorted(unknown))}. They lie behind "
            "everything that is trained, and could be left as they are, but ONNX Runtime does not have them: nobody "
            "could run what would be written.",
            hint=HINT,
        )


def is_known(domain: str, operator: str, opset: int) -> bool:
    """Does ONNX Runtime have the operator, in this opset of its domain?"""
    return _first_opsets().get((domain, operator), opset + 1) <= opset


@cache
def _first_opsets() -> dict[tuple[str, str], int]:
    known: dict[tuple[str, str], int] = {}
    for schema in runtime.get_all_operator_schema():
        key = (_domain(schema.domain), schema.name)
        known[key] = min(known.get(key, schema.since_version), schema.since_version)
    return known


def try_behind(program: Program, samples: Sequence[torch.Tensor]) -> None:
    """Runs what lies behind the network on what the network computes from `samples`.

    Raises `UnsupportedModel` where ONNX Runtime cannot open it, or takes too much memory or time. An error that depends
    on the data is none: these samples are made up, and a detector may well find nothing in them.
    """
    behind = program.origin.behind if program.origin else None
    if behind is None:
        return
    with torch.no_grad():
        results = program.module(*samples)
    values = dict(zip(program.onnx_inputs, samples, strict=True)) | dict(
        zip(program.onnx_outputs, results, strict=True)
    )
    model = _model(behind, values)
    given = {entry.name: as_numpy(values[entry.name]) for entry in model.graph.input}
    try:
        with quiet():
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), _options(), providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # of many kinds, none of them public
        raise _refused(behind, _reason(error) or f"ONNX Runtime cannot run them: {str(error)[:300]}") from error
    run = onnxruntime.RunOptions()
    ended = threading.Event()

    def end() -> None:
        ended.set()
        run.terminate = True

    timer = threading.Timer(SECONDS, end)
    timer.start()
    try:
        session.run(None, given, run)
    except Exception as error:
        reason = f"for three samples they take more than {SECONDS:.0f} seconds" if ended.is_set() else _reason(error)
        if reason:
            raise _refused(behind, reason) from error
    finally:
        timer.cancel()


def _reason(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError) or any(each in text for each in TOO_LARGE):
        return "for three samples they take too much memory"
    return None


def _refused(behind: Behind, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Behind everything that is trained, the model uses {', '.join(behind.operators)}, which would be left as they "
        f"are, but {reason}.",
        hint=HINT,
    )


def _model(behind: Behind, values: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """What lies behind as a model of its own, whose inputs are what it takes from the network and from its inputs."""
    graph = onnx.GraphProto.FromString(behind.graph)
    made = {name for node in graph.node for name in node.output}
    taken = {name for node in graph.node for name in names_of(node)} - made
    kinds = {dtype: number for number, dtype in DTYPES.items()}
    for name, value in values.items():
        if name in taken:
            graph.input.append(onnx.helper.make_tensor_value_info(name, kinds[value.dtype], [None] * value.ndim))
    outputs = [value for value in graph.output if value.name in made]
    del graph.output[:]
    graph.output.extend(outputs)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in behind.opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def _options() -> onnxruntime.SessionOptions:
    options = silent_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    todo = [graph]
    while todo:
        for node in todo.pop().node:
            yield node
            for attribute in node.attribute:
                todo.extend([attribute.g] if attribute.HasField("g") else [])
                todo.extend(attribute.graphs)


def _domain(domain: str) -> str:
    return "" if domain in ONNX_DOMAINS else domain
