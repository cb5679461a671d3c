# SPDX-License-Identifier: Apache-2.0
"""What only a GPU reaches of its worker and backends, with fakes for the device; docs/gpu.md says what has not run."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.v1.worker.gpu_worker")

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker import gpu_worker as theirs

from heterospec_vllm.layers.attention_flash import HeteroSpecFlashBackend
from heterospec_vllm.layers.attention_gpu import TreeBuilder, TreeImpl
from heterospec_vllm.layers.attention_triton import HeteroSpecTritonBackend
from heterospec_vllm.plugin import compat, wraps
from heterospec_vllm.runners import gpu_worker, v2
from heterospec_vllm.runners.worker import HeteroSpecCPUWorker
from heterospec_vllm.runners.worker_calls import WorkerCalls

BACKENDS = [HeteroSpecFlashBackend, HeteroSpecTritonBackend]


def _worker(use_v2: bool = True, async_scheduling: bool = False) -> gpu_worker.HeteroSpecGPUWorker:
    worker = object.__new__(gpu_worker.HeteroSpecGPUWorker)
    worker.use_v2_model_runner = use_v2
    worker.vllm_config = _config(async_scheduling)
    worker.device = "device"
    return worker


def _config(async_scheduling: bool) -> SimpleNamespace:
    return SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=async_scheduling))


def test_make_model_runner_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(v2, "HeteroSpecGPUModelRunner", lambda *given: made.append(given) or "ours")
    worker = _worker()
    assert worker._make_model_runner() == "ours"
    assert made == [(worker.vllm_config, "device")]
    # vLLM's worker still asks this method for its runner.
    assert "_make_model_runner" in theirs.Worker._init_workspace_and_model_runner.__code__.co_names


def test_the_old_runner_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model runner: found V1, allowed on GPUs: V2"):
        _worker(use_v2=False).init_device()


ASYNC_REFUSED = r"^heterospec: async_scheduling: found True, allowed: False"


def test_async_scheduling_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs.Worker, "init_device", lambda self: pytest.fail("went on"))
    with pytest.raises(ValueError, match=ASYNC_REFUSED):
        _worker(async_scheduling=True).init_device()


def test_async_scheduling_is_refused_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_worker.CPUWorker, "init_device", lambda self: pytest.fail("went on"))
    worker = object.__new__(HeteroSpecCPUWorker)
    worker.use_v2_model_runner, worker.vllm_config = False, _config(async_scheduling=True)
    with pytest.raises(ValueError, match=ASYNC_REFUSED):
        worker.init_device()


def test_init_device_registers_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {}
    monkeypatch.setattr(gpu_worker, "register_backend", registered.__setitem__)
    monkeypatch.setattr(theirs.Worker, "init_device", lambda self: None)
    _worker().init_device()
    for backend, path in registered.items():
        module, name = path.rsplit(".", 1)
        found = getattr(__import__(module, fromlist=[name]), name)
        assert issubclass(found, backend.get_class())
    assert set(registered) == {AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN}


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_vllms_with_trees(backend) -> None:
    builder, impl = backend.get_builder_cls(), backend.get_impl_cls()
    assert issubclass(builder, TreeBuilder) and issubclass(impl, TreeImpl)
    [base] = backend.__bases__
    assert issubclass(builder, base.get_builder_cls()) and issubclass(impl, base.get_impl_cls())
    assert backend.get_name() == base.get_name()
    # vLLM turns full CUDA graphs into piecewise ones.
    support = builder.get_cudagraph_support(SimpleNamespace(), SimpleNamespace())
    assert support == AttentionCGSupport.NEVER


def test_calls_come_before_vllms_worker() -> None:
    order = gpu_worker.HeteroSpecGPUWorker.__mro__
    assert order.index(WorkerCalls) < order.index(theirs.Worker)


@pytest.mark.parametrize(("platform", "worker"), [("cpu", "CPU"), ("cuda", "GPU"), ("rocm", "GPU")])
def test_platform_chooses_the_worker(
    platform: str, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "platform_name", lambda: platform)
    assert f".HeteroSpec{worker}Worker" in wraps.worker_class()
