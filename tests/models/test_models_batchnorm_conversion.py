"""BatchNorm conversion: the eval function stays, train mode comes close to it, ranks agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mooring.models.batchnorm_conversion import ConversionError, collect_statistics, convert_
from mooring.models.encoder import build_encoder
from mooring.models.torchvision_shim import import_timm

timm = import_timm()


def norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


class Twice(nn.Module):
    """A layer that runs twice in a forward, one that never runs, one without affine weights, one without buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = timm.layers.BatchNormAct2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.synchronised = nn.SyncBatchNorm(8)
        self.dead = nn.BatchNorm2d(8)
        self.untracked = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.second(self.shared(self.first(x))))
        return self.synchronised(self.plain(x)).mean((2, 3))


def twice() -> nn.Module:
    torch.manual_seed(0)
    net = Twice()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in norms(net):
            if norm.running_mean is not None:
                norm.running_mean.copy_(torch.randn(8, generator=generator) * 0.3)
                norm.running_var.copy_(torch.rand(8, generator=generator) + 0.3)
            if norm.weight is not None:
                norm.weight.copy_(torch.randn(8, generator=generator) * 0.3 + 1)
    return net


def batches(count: int = 3, size: int = 6, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(size, 3, 12, 12, generator=generator) + 1 for _ in range(count)]


def test_statistics_are_those_of_hooks_and_the_model_is_left_alone() -> None:
    net, images = twice().train(), batches()
    images[2] = images[2][:2]  # a short last batch counts as much as a whole one
    net.dead.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    statistics = collect_statistics(net, images)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in net.modules())

    pooled = collect_statistics(net, images, pooled=True).mean_and_var()
    seen: dict[str, list[Tensor]] = {}
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].double())
            )
    net.eval()
    with torch.no_grad():
        features = torch.cat([net(x) for x in images]).double()
    measured = statistics.mean_and_var()
    assert set(measured) == set(seen) == {"shared", "plain", "synchronised"} == set(statistics.called)
    for name, inputs in seen.items():
        assert len(inputs) == (6 if name == "shared" else 3)
        for got, expected in zip(
            measured[name],
            (
                torch.stack([x.mean((0, 2, 3)) for x in inputs]),
                torch.stack([x.var((0, 2, 3)) for x in inputs]),
            ),
            strict=True,
        ):
            torch.testing.assert_close(got, expected.mean(0), rtol=1e-5, atol=1e-6)
        whole = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
        torch.testing.assert_close(pooled[name], (whole.mean(1), whole.var(1)), rtol=1e-5, atol=1e-6)
    largest = torch.linalg.eigvalsh(features.T @ features / len(features))[-1].item()
    assert statistics.lambda_max == pytest.approx(largest, rel=1e-5)
    assert statistics.auto_head_lr == pytest.approx(3 / largest, rel=1e-5)
    assert statistics.largest_head_lr == pytest.approx(7.6 / largest, rel=1e-5)


def test_a_layer_of_another_kind_runs_its_own_forward() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(3), nn.BatchNorm2d(3)).eval()
    first, second = collect_statistics(net, batches(1)).mean_and_var().values()
    torch.testing.assert_close(second[1], 4 * first[1] / (1 + 1e-5), rtol=1e-5, atol=1e-5)


def test_max_images_takes_whole_batches() -> None:
    net = twice()
    assert collect_statistics(net, iter(batches(3)), max_images=7).images == 12
    with pytest.raises(ConversionError, match="at least one batch of images; got none"):
        collect_statistics(net, [])


@pytest.mark.parametrize("encoder", ["twice", "test_resnet"])
def test_the_eval_function_stays_for_any_statistics(encoder: str) -> None:
    net = twice() if encoder == "twice" else build_encoder("test_resnet", weights="none")
    net.eval()
    images = batches(1)[0] if encoder == "twice" else torch.randn(4, 3, 64, 64)
    statistics = collect_statistics(net, [images])
    generator = torch.Generator().manual_seed(3)
    statistics.first.copy_(torch.randn(len(statistics.first), generator=generator, dtype=torch.float64))
    statistics.second.copy_(torch.rand(len(statistics.second), generator=generator, dtype=torch.float64) * 3)
    statistics.second[::7] = 0.0
    with torch.no_grad():
        before = net(images)
        if encoder == "twice":
            with pytest.warns(UserWarning, match="BatchNorm dead never ran"):
                done = convert_(net, statistics)
            assert done.skipped == {
                "untracked": "keeps no running statistics",
                "dead": "never ran in the statistics pass",
            }
            assert net.plain.affine and isinstance(net.plain.weight, nn.Parameter)
            assert net.plain.bias.requires_grad
        else:
            done = convert_(net, statistics)
            assert len(done.converted) == len(norms(net)) > 3
        torch.testing.assert_close(net(images), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
        once = copy.deepcopy(net.state_dict())
        with pytest.warns(UserWarning) if encoder == "twice" else torch.no_grad():
            convert_(net, statistics)
    assert all(torch.equal(v, once[k]) for k, v in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_the_order_of_layers_does_not_matter() -> None:
    """Statistics measured after some layers were converted are those measured before."""
    net, images = twice(), batches()
    statistics = collect_statistics(net, images)
    part = copy.deepcopy(statistics)
    part.weight[1:] = 0  # the first layer only
    convert_(net, part)
    again = collect_statistics(net, images)
    torch.testing.assert_close(again.first, statistics.first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.second, statistics.second, rtol=1e-5, atol=1e-5)


def test_train_mode_comes_close_to_the_eval_function() -> None:
    torch.manual_seed(0)
    net = build_encoder("test_resnet", weights="none").eval()
    source = torch.randn(64, 3, 48, 48)
    convert_(net, collect_statistics(net, [source]))  # a net whose statistics fit its own data
    target = [0.3 * torch.randn(64, 3, 48, 48) + 2 for _ in range(3)]

    @torch.no_grad()
    def train_mode_error(model: nn.Module) -> float:
        model = copy.deepcopy(model)
        wanted = model(target[0])
        return ((model.train()(target[0]) - wanted).norm() / wanted.norm()).item()

    without = train_mode_error(net)
    convert_(net, collect_statistics(net, target))
    assert train_mode_error(net) < 0.2 * without


def test_what_cannot_be_converted_is_said() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.LayerNorm(4))
    done = convert_(plain, collect_statistics(plain, batches()))
    assert done.converted == () and "no BatchNorm layer to convert" in done.note
    net = nn.Sequential(nn.BatchNorm2d(3))
    statistics = collect_statistics(net, batches())
    with pytest.raises(ConversionError, match="expected statistics of this encoder"):
        convert_(twice(), statistics)
    with pytest.raises(TypeError, match="must be float32 or float64; got bfloat16"):
        convert_(copy.deepcopy(net).bfloat16(), statistics)
    statistics.first[1] = torch.nan
    with pytest.raises(ConversionError, match="the statistics of 0 must be finite"):
        convert_(net, statistics)


def test_a_dead_channel_is_listed() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    net[0].running_var[1] = 0.0
    images = [100 * x for x in batches()]
    done = convert_(net, collect_statistics(net, images))
    assert done.outliers == {"0": [1]}


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        statistics = collect_statistics(twice(), batches(4)[rank::2]).reduce()
        torch.save((statistics.mean_and_var(), statistics.lambda_max), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_find_what_one_finds_on_all_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    alone = collect_statistics(twice(), batches(4))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found, largest in ranks:
        torch.testing.assert_close(found, alone.mean_and_var(), rtol=1e-12, atol=1e-12)
        assert largest == pytest.approx(alone.lambda_max, rel=1e-6)
    for name, values in ranks[0][0].items():
        assert all(torch.equal(a, b) for a, b in zip(values, ranks[1][0][name], strict=True))
