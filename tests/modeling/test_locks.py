import copy
import gc
import importlib.util
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from hf_hyperflow.modeling import locks
from hf_hyperflow.modeling.locks import get_lock, ignored_warnings
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import lora_config
from tests.helpers.tiny import Snapshot, same_bits


def is_free(lock: threading.RLock) -> bool:
    """Whether another thread could take a lock."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: lock.acquire(blocking=False) and (lock.release() or True)).result()


def test_a_backbone_has_one_lock_that_its_thread_can_take_again(backbone):
    lock = get_lock(backbone)
    with lock, get_lock(backbone):
        assert get_lock(backbone) is lock
        assert not is_free(lock)
    assert is_free(lock)


def test_threads_that_ask_first_get_the_same_lock():
    for _ in range(20):
        backbone, barrier = torch.nn.Identity(), threading.Barrier(8)

        def ask(_: int, backbone=backbone, barrier=barrier) -> threading.RLock:
            barrier.wait()
            return get_lock(backbone)

        with ThreadPoolExecutor(8) as threads:
            assert len(set(map(id, threads.map(ask, range(8))))) == 1


def test_a_lock_is_no_part_of_the_backbone(backbone):
    before = Snapshot(backbone)
    with get_lock(backbone):
        before.assert_unchanged()
        copies = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))]
    for copied in copies:
        assert get_lock(copied) is not get_lock(backbone)
        assert is_free(get_lock(copied))


def test_copies_of_the_module_share_the_locks(backbone):
    """Each checkpoint that is loaded as remote code has a copy."""
    specification = importlib.util.spec_from_file_location("copied_locks", locks.__file__)
    copied = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copied)
    assert copied.get_lock is not get_lock
    assert copied.get_lock(backbone) is get_lock(backbone)


def test_a_lock_goes_with_its_backbone():
    backbone = torch.nn.Identity()
    get_lock(backbone)
    gc.collect()
    n_locks = len(locks._locks)
    del backbone
    gc.collect()
    assert len(locks._locks) == n_locks - 1


def test_an_injection_that_was_taken_out_is_not_used(backbone, adapter):
    injection = adapter.space.inject(backbone)
    injection.remove()
    with (
        pytest.raises(RuntimeError, match="this adapter was taken out of the backbone"),
        injection.using(torch.ones(1)),
    ):
        pass


@pytest.mark.parametrize("enter", ["using", "tuning"])
def test_weights_in_use_hold_the_lock(backbone, adapter, enter):
    injection = adapter.space.inject(backbone)
    block = injection.using(injection.start) if enter == "using" else injection.tuning()
    with block:
        assert not is_free(get_lock(backbone))
    assert is_free(get_lock(backbone))


def test_filters_of_warnings_are_put_back_whichever_thread_ends_last():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        barrier = threading.Barrier(8)

        def ignore(number: int) -> None:
            barrier.wait()
            for i in range(50):
                with ignored_warnings((f"{number}-{i}", UserWarning)):
                    warnings.warn(f"{number}-{i} and more", UserWarning, stacklevel=1)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(ignore, range(8)))
        assert warnings.filters == before
        assert not caught
        with ignored_warnings(("one", UserWarning)), pytest.warns(UserWarning, match="another"):
            warnings.warn("another", UserWarning, stacklevel=1)


# The random start of an adapter


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_start_is_that_of_peft_with_the_seed(backbone, init):
    config = lora_config(backbone, 2, r=3)
    config.init_lora_weights = init
    space = ParameterSpace.from_backbone(backbone, config, seed=5)
    config.inference_mode = False
    torch.manual_seed(5)
    peft_model = get_peft_model(copy.deepcopy(backbone), copy.deepcopy(config)).base_model.model
    expected = space.to_tokens(peft_model.get_parameter(name) for name in space.names)
    space.seed = 5
    assert same_bits(space.inject(backbone).start, expected)


def test_threads_that_draw_random_numbers_do_not_change_the_start_nor_the_start_what_they_draw(backbone):
    space = ParameterSpace.from_backbone(backbone, lora_config(backbone, 2, r=3))
    expected = space.inject(backbone).start
    torch.manual_seed(3)
    alone = torch.cat([torch.rand(1) for _ in range(3000)])
    torch.manual_seed(3)
    drawn: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: drawn.extend(torch.rand(1) for _ in range(3000)))
    thread.start()
    while thread.is_alive():
        space.inject(backbone).remove()
        assert same_bits(space.inject(backbone).start, expected)
    assert same_bits(torch.cat(drawn), alone)
