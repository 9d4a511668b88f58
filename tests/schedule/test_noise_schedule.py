"""The noise schedule against its definitions, against diffusers, and its errors."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from refusals import by, refused

from ddpm_fast import NoiseSchedule, q_sample
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.schedule import numbered

BUILDERS = ("linear", "scaled_linear", "cosine", "sigmoid", "laplace", "flow", "sigmoid_betas")


@pytest.mark.parametrize("num_timesteps", [1, 2, 100, 1000])
@pytest.mark.parametrize("builder", BUILDERS)
def test_identities_of_the_derivation(builder: str, num_timesteps: int) -> None:
    s = getattr(NoiseSchedule, builder)(num_timesteps)
    assert s.num_timesteps == num_timesteps
    # eq. 2: abar_t is the product of the alphas, here summed in logarithms.
    torch.testing.assert_close(s.alpha_bars.log(), torch.log1p(-s.betas).cumsum(0), rtol=1e-11, atol=1e-13)
    # eq. 7 applied to the means of eq. 3: mu~(x_0, sqrt(abar_t) x_0) = sqrt(abar_{t-1}) x_0.
    mean = s.posterior_mean_coef_x_0 + s.posterior_mean_coef_x_t * s.sqrt_alpha_bars
    # 1 - abar has lost the digits of 1 that are below the first beta, which is 1e-6 in the flow schedule.
    torch.testing.assert_close(mean, s.alpha_bars_prev.sqrt(), rtol=max(1e-12, 2e-17 / float(s.betas[0])), atol=0)
    # eq. 6: by Bayes' rule, precisions add: 1 / beta~ = alpha / beta + 1 / (1 - abar_{t-1}).
    precision = s.alphas / s.betas + 1 / (1 - s.alpha_bars_prev)
    torch.testing.assert_close(s.posterior_variance[1:], 1 / precision[1:], rtol=1e-9, atol=0)
    torch.testing.assert_close(s.snr, (s.sqrt_alpha_bars / s.sqrt_one_minus_alpha_bars).square())
    assert torch.isfinite(s.posterior_log_variance).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *(("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")),
        *(("laplace", "laplace"), ("sigmoid_betas", "sigmoid")),
    ],
)
def test_betas_equal_diffusers(ours: str, theirs: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(beta_schedule=theirs).betas
    torch.testing.assert_close(getattr(NoiseSchedule, ours)().betas.float(), expected, rtol=1e-5, atol=1e-7)


def test_published_terminal_values() -> None:
    """abar_{T-1} of the linear schedule as everyone computes it, and of the sigmoid one as denoising-diffusion-pytorch does."""
    assert NoiseSchedule.linear().alpha_bars[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert NoiseSchedule.cosine().alpha_bars[-1].item() == pytest.approx(2.43e-9, rel=2e-3)
    assert NoiseSchedule.sigmoid().alpha_bars[-1].item() == pytest.approx(3.0e-7, rel=2e-2)


def test_scaling_to_the_number_of_timesteps() -> None:
    short = NoiseSchedule.linear(100, scale_to_num_timesteps=True)
    assert short.betas[-1].item() == pytest.approx(0.2)
    assert NoiseSchedule.linear(100).betas[-1].item() == pytest.approx(0.02)


def test_zero_terminal_snr() -> None:
    schedule = NoiseSchedule.linear()
    rescaled = schedule.rescale_zero_terminal_snr()
    assert rescaled.alpha_bars[-1] == 0
    assert rescaled.alpha_bars[0].item() == pytest.approx(schedule.alpha_bars[0].item(), rel=1e-12)
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(rescaled.alpha_bars.float(), expected, rtol=1e-4, atol=1e-7)


def test_table_is_rounded_once_from_float64() -> None:
    schedule = NoiseSchedule.linear()
    table = schedule.table()
    assert table.dtype == torch.float32
    assert torch.equal(table[:, 1], (1 - schedule.alpha_bars).sqrt().float())


def test_a_schedule_never_changes() -> None:
    schedule, fresh = NoiseSchedule.linear(10), NoiseSchedule.linear(10)
    names = [name for name in dir(schedule) if not name.startswith("_") and isinstance(getattr(fresh, name), torch.Tensor)]
    assert len(names) == 13
    for _ in range(2):  # also what is computed from a coefficient that was handed out
        for name in names:
            getattr(schedule, name).zero_()
        schedule.table().zero_()
    x, t = torch.ones(2, 3), torch.tensor([0, 9])
    assert torch.equal(q_sample(x, t, schedule, noise=x), q_sample(x, t, fresh, noise=x))
    assert [name for name in names if not torch.equal(getattr(schedule, name), getattr(fresh, name))] == []
    for name in ("name", "betas"):
        with pytest.raises(AttributeError):
            setattr(schedule, name, getattr(fresh, name))
    assert schedule == fresh
    assert copy.deepcopy(schedule) is schedule


def test_tables_are_kept_by_the_number_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors name their device by number. "cuda" is another one when the current GPU changes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # the trial allocation of `checked_device`
    for device, wanted in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), (torch.device("cpu"), "cpu")):
        assert str(numbered(device)) == wanted


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda: NoiseSchedule.linear(0),
            by("NoiseSchedule.linear", InvalidValue("num_timesteps", "to be an integer in 1..100000", "0")),
        ),
        (
            lambda: NoiseSchedule.from_betas([0.1, 1.5]),
            by("NoiseSchedule.from_betas", InvalidValue("betas", "to be in (0, 1]", "1.5 at index 1")),
        ),
        (
            lambda: NoiseSchedule.from_betas([0.0]),
            by("NoiseSchedule.from_betas", InvalidValue("betas", "to be in (0, 1]", "0 at index 0")),
        ),
        (
            lambda: NoiseSchedule.from_betas([0.1, math.nan, 2]),
            by("NoiseSchedule.from_betas", InvalidValue("betas", "to be in (0, 1]", "nan at index 1")),
        ),
        (
            lambda: NoiseSchedule.from_betas([]),
            by(
                "NoiseSchedule.from_betas",
                InvalidValue(
                    "betas",
                    "to be a floating tensor of shape [T] with values, T in 1..100000",
                    "torch.float64 [0] on cpu",
                ),
            ),
        ),
        (
            lambda: NoiseSchedule.from_config({"name": "exp"}),
            by(
                "NoiseSchedule.from_config",
                InvalidValue(
                    "name",
                    "to be one of linear, scaled_linear, cosine, sigmoid, laplace, flow, sigmoid_betas, from_betas",
                    "'exp'",
                ),
            ),
        ),
        (
            lambda: NoiseSchedule.from_config({"name": []}),
            by(
                "NoiseSchedule.from_config",
                InvalidValue(
                    "name",
                    "to be one of linear, scaled_linear, cosine, sigmoid, laplace, flow, sigmoid_betas, from_betas",
                    "[]",
                ),
            ),
        ),
        (
            lambda: NoiseSchedule.from_config({"name": "linear", "s": 1}),
            by(
                "NoiseSchedule.from_config",
                InvalidValue(
                    "",
                    "the arguments of linear to be among num_timesteps, beta_start, beta_end, scale_to_num_timesteps",
                    "s",
                ),
            ),
        ),
        (
            lambda: NoiseSchedule.from_config({"name": "from_betas"}),
            by("NoiseSchedule.from_config", InvalidValue("", "the arguments of from_betas to be among betas", "none")),
        ),
        (
            lambda: NoiseSchedule.from_diffusers({"beta_schedule": []}),
            by(
                "NoiseSchedule.from_diffusers",
                InvalidValue(
                    "beta_schedule",
                    "to be one of linear, scaled_linear, squaredcos_cap_v2, laplace, sigmoid",
                    "[]",
                ),
            ),
        ),
        (
            lambda: NoiseSchedule.cosine(100_001),
            by("NoiseSchedule.cosine", InvalidValue("num_timesteps", "to be an integer in 1..100000", "100001")),
        ),
        (
            lambda: NoiseSchedule.from_betas([0.1] * 100_001),
            by(
                "NoiseSchedule.from_betas",
                InvalidValue(
                    "betas",
                    "to be a floating tensor of shape [T] with values, T in 1..100000",
                    "torch.float64 [100001] on cpu",
                ),
            ),
        ),
        (
            lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(),
            by("NoiseSchedule.rescale_zero_terminal_snr", InvalidValue("", "a schedule of at least 2 timesteps", "1")),
        ),
        (
            lambda: NoiseSchedule.scaled_linear(beta_start=-1.0),
            by("NoiseSchedule.scaled_linear", InvalidValue("beta_start", "to be positive and at most 1", "-1.0")),
        ),
        (lambda: NoiseSchedule.cosine(s="x"), by("NoiseSchedule.cosine", InvalidType("s", "to be a number", "str"))),  # type: ignore[arg-type]
        (
            lambda: NoiseSchedule.sigmoid(tau=0),
            by("NoiseSchedule.sigmoid", InvalidValue("start", "unequal to end, and tau unequal to 0", "-3.0, 3.0 and 0")),
        ),
        (
            lambda: NoiseSchedule.laplace(max_beta=math.nan),
            by("NoiseSchedule.laplace", InvalidValue("max_beta", "to be positive and at most 1", "nan")),
        ),
    ],
)
def test_errors(make: Callable[[], object], error: ArgumentError) -> None:
    with refused(error):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NoiseSchedule([0.1]),
            r"NoiseSchedule: expected betas to be a floating tensor .*, got list: .*from_betas",
        ),
        (lambda: NoiseSchedule.linear(10, "x"), r"NoiseSchedule\.linear: expected beta_start to be a number, got str"),
        (lambda: NoiseSchedule.from_betas("x"), r"from_betas: expected betas to be T numbers, got "),
        (
            lambda: NoiseSchedule.from_betas([0.1, None]),
            r"from_betas: expected betas to be T numbers, got ",
        ),
        (lambda: NoiseSchedule.from_config(5), "'int' object is not iterable"),
        (lambda: NoiseSchedule.from_diffusers({"rescale_betas_zero_snr": 1}), "rescale_betas_zero_snr to be a bool, got int"),
        (lambda: NoiseSchedule.from_diffusers({"beta_end": None}), "diffusers: expected beta_end to be a number, got NoneType"),
    ],
)
def test_wrong_types(make, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()
