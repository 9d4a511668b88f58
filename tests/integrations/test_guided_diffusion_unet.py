"""Weights of guided-diffusion's U-Nets: against that network as a function of its weights, and recorded outputs of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from record_guided_diffusion import layout, recorded, recorded_layouts
from torch import Tensor

from ddpm_fast import freeze
from ddpm_fast.integrations.guided_diffusion import load_guided_diffusion

FLAGS: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,3",
    "attention_resolutions": "8,4",
    "num_heads": 4,
    "use_scale_shift_norm": False,
}
CASES: dict[str, dict[str, Any]] = {
    "heads-of-any-width": {},
    "one-head-two-blocks": {"num_heads": 1, "num_res_blocks": 2},
    "new-order": {"use_new_attention_order": True, "num_heads": 2},
    "scale-shift-learned": {"use_scale_shift_norm": True, "learn_sigma": True},
    "dhariwal-nichol": {
        "num_head_channels": 16,
        "use_new_attention_order": True,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "learn_sigma": True,
        "class_cond": True,
    },
    "legacy-order-updown": {"num_head_channels": 32, "resblock_updown": True, "attention_resolutions": "16,4"},
    "half-width": {"num_channels": 64, "channel_mult": (0.5, 1), "attention_resolutions": "8", "resblock_updown": True},
}


class Original:
    """Random weights under the original's names, and its network as a function of them, layer by layer."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self.flags, self.weights = flags, {}
        self.generator = torch.Generator().manual_seed(0)
        base = flags["num_channels"]
        mults = flags["channel_mult"]
        mults = [float(m) for m in (mults.split(",") if isinstance(mults, str) else mults)]
        widths, self.emb = [int(base * m) for m in mults], 4 * base
        strides = {flags["image_size"] // int(r) for r in flags["attention_resolutions"].split(",")}
        updown, blocks = flags.get("resblock_updown", False), flags["num_res_blocks"]
        self._linear("time_embed.0", base, self.emb)
        self._linear("time_embed.2", self.emb, self.emb)
        if flags.get("class_cond"):
            self.weights["label_emb.weight"] = self._draw(10, self.emb)
        self.down: list[list[tuple[str, str]]] = [[("input_blocks.0.0", "conv")]]
        self._conv("input_blocks.0.0", 3, widths[0])
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                self._add(self.down, "input_blocks", [("res", width, out)], out, 2**level in strides)
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self._add(self.down, "input_blocks", [("down" if updown else "op", width, width)], width, False)
                skips.append(width)
        self.middle = [("middle_block.0", "res"), ("middle_block.1", "attention"), ("middle_block.2", "res")]
        for name, kind in self.middle:
            self._attention(name, width) if kind == "attention" else self._resnet(name, width, width)
        self.up: list[list[tuple[str, str]]] = []
        for level, out in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                extra = [("up" if updown else "conv-up", out, out)] if level and i == blocks else []
                layers = [("res", width + skips.pop(), out), *extra]
                self._add(self.up, "output_blocks", layers, out, 2**level in strides)
                width = out
        self._norm("out.0", width)
        self._conv("out.2", width, 6 if flags.get("learn_sigma") else 3)

    def _draw(self, *shape: int) -> Tensor:
        fan = math.prod(shape[1:]) if len(shape) > 1 else 10
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) / math.sqrt(fan)

    def _linear(self, name: str, ins: int, outs: int, *kernel: int) -> None:
        self.weights |= {f"{name}.weight": self._draw(outs, ins, *kernel), f"{name}.bias": self._draw(outs)}

    def _conv(self, name: str, ins: int, outs: int) -> None:
        self._linear(name, ins, outs, 3, 3)

    def _norm(self, name: str, width: int) -> None:
        self.weights |= {f"{name}.weight": 1 + self._draw(width), f"{name}.bias": self._draw(width)}

    def _resnet(self, name: str, ins: int, outs: int) -> None:
        self._norm(f"{name}.in_layers.0", ins)
        self._conv(f"{name}.in_layers.2", ins, outs)
        self._linear(f"{name}.emb_layers.1", self.emb, outs * (2 if self.flags["use_scale_shift_norm"] else 1))
        self._norm(f"{name}.out_layers.0", outs)
        self._conv(f"{name}.out_layers.3", outs, outs)
        if ins != outs:
            self._linear(f"{name}.skip_connection", ins, outs, 1, 1)

    def _attention(self, name: str, width: int) -> None:
        self._norm(f"{name}.norm", width)
        self._linear(f"{name}.qkv", width, 3 * width, 1)
        self._linear(f"{name}.proj_out", width, width, 1)

    def _add(
        self, path: list[list[tuple[str, str]]], prefix: str, layers: list[tuple[str, int, int]], width: int, attended: bool
    ) -> None:
        kinds: list[tuple[str, int, int]] = layers[:1] + [("attention", width, width)] * attended + layers[1:]
        block = []
        for i, (kind, ins, outs) in enumerate(kinds):
            name = f"{prefix}.{len(path)}.{i}"
            if kind == "attention":
                self._attention(name, ins)
            elif kind in ("op", "conv-up"):
                self._conv(f"{name}.{'op' if kind == 'op' else 'conv'}", ins, outs)
            else:
                self._resnet(name, ins, outs)
            block.append((name, kind))
        path.append(block)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        base = self.flags["num_channels"]
        angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(base // 2, dtype=torch.float64) / (base // 2))
        emb = self._product("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
        emb = self._product("time_embed.2", F.silu(emb))
        emb = F.silu(emb if y is None else emb + self.weights["label_emb.weight"][y])
        skips = []
        for block in self.down:
            x = self._through(block, x, emb)
            skips.append(x)
        x = self._through(self.middle, x, emb)
        for block in self.up:
            x = self._through(block, torch.cat([x, skips.pop()], dim=1), emb)
        return self._convolved("out.2", F.silu(self._normed("out.0", x)))

    def _product(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _convolved(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5)

    def _through(self, block: list[tuple[str, str]], x: Tensor, emb: Tensor) -> Tensor:
        for name, kind in block:
            if kind == "conv":
                x = self._convolved(name, x)
            elif kind == "op":
                x = self._convolved(f"{name}.op", x, stride=2)
            elif kind == "conv-up":
                x = self._convolved(f"{name}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
            elif kind == "attention":
                x = self._attend(name, x)
            else:
                h = F.silu(self._normed(f"{name}.in_layers.0", x))
                if kind == "down":
                    x, h = (m.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean(dim=(3, 5)) for m in (x, h))
                if kind == "up":
                    x, h = (m.repeat_interleave(2, 2).repeat_interleave(2, 3) for m in (x, h))
                h = self._convolved(f"{name}.in_layers.2", h)
                time = self._product(f"{name}.emb_layers.1", emb)[..., None, None]
                if self.flags["use_scale_shift_norm"]:
                    scale, shift = time.chunk(2, dim=1)
                    h = self._normed(f"{name}.out_layers.0", h) * (1 + scale) + shift
                else:
                    h = self._normed(f"{name}.out_layers.0", h + time)
                h = self._convolved(f"{name}.out_layers.3", F.silu(h))
                skip = f"{name}.skip_connection"
                x = h + (self._convolved(skip, x) if f"{skip}.weight" in self.weights else x)
        return x

    def _attend(self, name: str, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        pixels = self._normed(f"{name}.norm", x).flatten(2)  # [N, C, HW]
        weight = self.weights[f"{name}.qkv.weight"][..., 0]
        qkv = weight @ pixels + self.weights[f"{name}.qkv.bias"][:, None]
        per_head = self.flags.get("num_head_channels", -1)
        heads = self.flags["num_heads"] if per_head == -1 else c // per_head
        if self.flags.get("use_new_attention_order"):
            q, k, v = qkv.reshape(n, 3, heads, c // heads, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(n, heads, 3, c // heads, -1).unbind(2)
        scores = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(c // heads), dim=-1)  # [N, heads, HW, HW]
        h = (v @ scores.transpose(2, 3)).reshape(n, c, -1)
        h = self.weights[f"{name}.proj_out.weight"][..., 0] @ h + self.weights[f"{name}.proj_out.bias"][:, None]
        return x + h.reshape(n, c, height, width)


def inputs(flags: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([3, 777]), torch.tensor([0, 9]) if flags.get("class_cond") else None


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_original_network(case: str) -> None:
    flags = FLAGS | CASES[case]
    original = Original(flags)
    model = load_guided_diffusion(original.weights, dtype=torch.float64, **flags)
    assert not model.training
    x, t, y = inputs(flags)
    with torch.no_grad():
        # The sinusoids are float32 here, as in the original.
        torch.testing.assert_close(model(x, t, y), original(x, t, y), rtol=1e-4, atol=1e-4)


def test_files_are_read_and_what_can_be_is_frozen(tmp_path: Path) -> None:
    flags = FLAGS | CASES["scale-shift-learned"]
    original = Original(flags)
    torch.save({name: weight.half() for name, weight in original.weights.items()}, tmp_path / "ema.pt")
    model = load_guided_diffusion(tmp_path / "ema.pt", **flags)
    assert model.conv_in.weight.dtype == torch.float32
    x, t, _ = inputs(flags)
    with torch.no_grad():
        expected = model(x.float(), t)
    torch.testing.assert_close(freeze(model, torch.float32)(x.float(), t), expected, rtol=1e-3, atol=1e-4)


def test_networks_are_kept_in_a_folder(tmp_path: Path) -> None:
    flags = FLAGS | CASES["half-width"]
    model = load_guided_diffusion(Original(flags).weights, **flags)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    x, t, _ = inputs(flags)
    with torch.no_grad():
        assert torch.equal(again(x, t), model(x, t))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_upsample": 2}, "expected num_heads_upsample to be -1 or num_heads, 4, got 2"),
        ({"channel_mult": "1,a"}, 'expected channel_mult to be positive numbers as "1,2,3,4", got .1,a.'),
        ({"channel_mult": ""}, "expected channel_mult to be given, or image_size to be one of 32, 64, 128, 256, 512, got 16"),
        ({"attention_resolutions": "8,x"}, 'expected attention_resolutions to be heights as "32,16,8", got .8,x.'),
        ({"class_cond": True}, "expected weights of a UNetModel .* got none named label_emb.weight"),
        (
            {"learn_sigma": True},
            r"expected conv_out.weight to have shape \[6, 32, 3, 3\] \(by a UNetModel with the given flags, which must be "
            r"those of its training\), got \[3, 32, 3, 3\], in 'path_or_state_dict'",
        ),
        ({"use_scale_shift_norm": True}, "expected .*time_emb_proj.* to have shape"),
        ({"resblock_updown": True}, "got missing down_blocks.0.downsamplers.0.conv1.bias"),
        ({"num_res_blocks": 2}, "got missing .* and .* more"),
        ({"num_heads": 5}, "UNet: expected num_attention_heads to be None or a divisor of every attention width"),
    ],
)
def test_flags_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_guided_diffusion(Original(FLAGS).weights, **FLAGS | changes)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"load_guided_diffusion: expected '.*text.pt' to be a whole file of torch.save"):
        load_guided_diffusion(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="path_or_state_dict to be or to hold tensors by name, got list"):
        load_guided_diffusion(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError):
        load_guided_diffusion(tmp_path / "none.pt")


@pytest.mark.filterwarnings("ignore")  # torch's, of old protocols
def test_a_damaged_file_is_a_value_error(tmp_path: Path) -> None:
    """Whatever the unpickler makes of it: a KeyError of its table, an AssertionError of torch's, ..."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "model.pt").read_bytes()
    for place in range(100):
        (tmp_path / "damaged.pt").write_bytes(whole[:place] + b"h" + whole[place + 1 :])  # in pickle: get from the table
        with pytest.raises(ValueError, match="load_guided_diffusion: expected "):
            load_guided_diffusion(tmp_path / "damaged.pt")


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_originals(case: str) -> None:
    flags = FLAGS | CASES[case]
    weights = Original(flags).weights
    assert layout(weights) == recorded_layouts()[f"unet {case}"]  # its names and shapes
    x, t, y = inputs(flags)
    with torch.no_grad():
        got = load_guided_diffusion(weights, **flags)(x, t, y)
    torch.testing.assert_close(got, recorded()[f"unet {case}"], rtol=1e-4, atol=1e-4)
