"""Replace calls of functions by their bodies: those of the model, and operators that ONNX composes of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference

_BODIES = "tvm-ternary:bodies"
"""The domain of functions that stand for a moment for nodes of a model."""

_DEEPEST = 8
"""Rounds after which expansion stops: a body may hold operators that are functions themselves."""


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline every function the model defines; a model without functions comes back as it is."""
    if not model.functions:
        return model
    return _without_weights(model, lambda light: onnx.inliner.inline_local_functions(light, convert_version=True))


def expand_operators(model: onnx.ModelProto, is_known: Callable[[str, str], bool]) -> onnx.ModelProto:
    """Write operators that the importer does not know as the standard says they are composed of others.

    Parameters
    ----------
    model : onnx.ModelProto
        The model.
    is_known : Callable[[str, str], bool]
        Whether the importer has a converter, by domain and operator.

    Returns
    -------
    onnx.ModelProto
        The model; an operator that is neither known nor composed stays.
    """
    versions = {"" if item.domain == "ai.onnx" else item.domain: item.version for item in model.opset_import}
    for _ in range(_DEEPEST):
        found = {_named(node) for node in _nodes(model.graph) if _is_composed(node, versions, is_known)}
        if not found:
            break
        try:
            model = _without_weights(model, partial(_expanded, operators=sorted(found), versions=versions))
        except RuntimeError:  # a type it cannot infer: the operators stay, and the walk names the first of them
            break
    return model


def _expanded(model: onnx.ModelProto, operators: list[tuple[str, str]], versions: Mapping[str, int]) -> onnx.ModelProto:
    """The inliner takes attributes from the node alone: it gets those that have a default."""
    for node in _nodes(model.graph):
        if _named(node) in operators:
            schema = onnx.defs.get_schema(node.op_type, versions[_named(node)[0]], _named(node)[0])
            given = {attribute.name for attribute in node.attribute}
            defaults = [a.default_value for name, a in schema.attributes.items() if name not in given]
            node.attribute.extend(value for value in defaults if value.type)
    model = _with_bodies(model, operators, versions)
    return onnx.inliner.inline_selected_functions(model, operators, exclude=False, inline_schema_functions=True)


def _with_bodies(
    model: onnx.ModelProto, operators: list[tuple[str, str]], versions: Mapping[str, int]
) -> onnx.ModelProto:
    """Write out nodes that leave an input out and whose bodies depend on what is given: the inliner cannot."""
    types: dict[str, onnx.TypeProto] = {}
    for index, node in enumerate(model.graph.node):
        domain, op = _named(node)
        if (domain, op) not in operators or "" not in node.input:
            continue
        schema: Any = onnx.defs.get_schema(op, versions[domain], domain)  # onnx's own stubs do not know its functions
        if not schema.has_context_dependent_function:
            continue
        types = types or _types(model)
        if any(name not in types for name in node.input if name):
            continue
        given = [(types[name] if name else onnx.TypeProto()).SerializeToString() for name in node.input]
        known = [v for v in schema.context_dependent_function_opset_versions if v <= versions[domain]]
        body = schema.get_context_dependent_function_with_opset_version(max(known), node.SerializeToString(), given)
        function = onnx.FunctionProto.FromString(body)
        function.domain, function.name = _BODIES, f"{op}_{index}"
        model.functions.append(function)
        node.domain, node.op_type = function.domain, function.name
        del node.attribute[:]
    if not model.functions:
        return model
    model.opset_import.add(domain=_BODIES, version=1)
    result = onnx.inliner.inline_local_functions(model)
    kept = [item for item in result.opset_import if item.domain != _BODIES]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    return result


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """The types of the values of a graph, by name, where they can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type for value in (*graph.input, *graph.value_info)}


def _without_weights(model: onnx.ModelProto, step: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """Let a step that serializes the model see its weights as inputs: protobuf ends at 2 GiB."""
    light = copy_without_weights(model)
    declared = {value.name for value in model.graph.input}
    added = [weight for weight in model.graph.initializer if weight.name not in declared]
    light.graph.input.extend(
        onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims) for weight in added
    )
    result = step(light)
    names = {weight.name for weight in added}
    inputs = [value for value in result.graph.input if value.name not in names]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    result.graph.initializer.extend(model.graph.initializer)
    return result


def copy_without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy everything but the initializers."""
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _assign(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _assign(light.graph, field.name, value)
    return light


def _assign(message: Any, name: str, value: Any) -> None:
    """Set a protobuf field of any kind."""
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(value)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, name, value)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _named(node: onnx.NodeProto) -> tuple[str, str]:
    """Domain and operator."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def _is_composed(node: onnx.NodeProto, versions: Mapping[str, int], is_known: Callable[[str, str], bool]) -> bool:
    domain, op = _named(node)
    if is_known(domain, op) or not onnx.defs.has(op, domain):
        return False
    try:
        schema = onnx.defs.get_schema(op, versions.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return False
    # onnx's own stubs do not know the two
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]
