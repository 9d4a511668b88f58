"""The fields of a kernel in the compiled module are those that its op gives: anything else is an ImportError."""

from types import SimpleNamespace

import pytest
import torch

from ddpm_fast import reference, sample_seeds
from ddpm_fast.ops import OPS, backend
from ddpm_fast.ops.compiled_kernel import CompiledKernel
from ddpm_fast.ops.op_spec import OpSpec, schema_of

pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module")

SCHEMA = schema_of(reference.q_sample)


def declare(schema: str, output: str = "x_t") -> None:
    CompiledKernel(OpSpec("q_sample", schema=schema, outputs={output: lambda a: torch.empty_like(a.x_0)}))


@pytest.mark.parametrize(
    ("schema", "output", "message"),
    [
        (SCHEMA.replace("? noise", "? epsilon"), "x_t", r"without a value: \['noise'\].*without a field: \['epsilon'\]"),
        (SCHEMA.replace(", Tensor? seeds", ""), "x_t", r"without a value: \['seeds'\].*without a field: none"),
        (f"{SCHEMA}, float scale", "x_t", r"without a value: none.*without a field: \['scale'\]"),
        (SCHEMA, "out", r"without a value: \['x_t'\].*without a field: \['out'\]"),
    ],
    ids=["renamed", "missing", "extra", "renamed result"],
)
def test_other_fields_are_an_import_error(schema: str, output: str, message: str) -> None:
    with pytest.raises(ImportError, match=f"does not fit this source: q_sample has fields {message}: build it again"):
        declare(schema, output)


@pytest.mark.parametrize("fields", [{}, {"fields": {}}], ids=["before there were fields", "before the kernel"])
def test_an_older_module_is_an_import_error(fields: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.ops.compiled_kernel.KERNELS", {"cpu": SimpleNamespace(**fields)})
    with pytest.raises(ImportError, match="older than this source and lacks q_sample: build it again"):
        declare(SCHEMA)


def test_fields_are_found_by_name_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap in the compiled module changes the order in which values are passed, not their meaning."""
    op, seeds = OPS["noise"], sample_seeds(3, 2)
    expected = op((2, 5), seeds, 7, torch.float32, False)
    fields = tuple(reversed(op.kernel.fields))

    def reversed_noise(*values: object) -> None:
        backend.native().cpu.noise(*reversed(values))

    kernels = SimpleNamespace(noise=reversed_noise, fields={"noise": fields})
    monkeypatch.setitem(backend.KERNELS, "cpu", kernels)
    kernel = CompiledKernel(op.spec)
    monkeypatch.setattr(op, "kernel", kernel)
    assert kernel.fields == fields
    assert torch.equal(op((2, 5), seeds, 7, torch.float32, False), expected)
