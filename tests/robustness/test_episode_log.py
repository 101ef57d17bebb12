from __future__ import annotations

import random

import pytest

from hf_hyperflow.benchmark.episode_log import EpisodeLog
from hf_hyperflow.modeling.saving import CheckpointError
from tests.benchmark.test_episode_log import row


@pytest.mark.slow
def test_a_changed_byte_is_noticed_or_makes_no_difference(tmp_path):
    log = EpisodeLog(tmp_path, {"seed": 0})
    log.append([row(i) for i in range(20)])
    content, errors = log.path.read_bytes(), []
    for position in random.Random(0).sample(range(len(content)), 200):
        changed = bytearray(content)
        changed[position] ^= 0x10
        log.path.write_bytes(changed)
        try:
            read = EpisodeLog(tmp_path, {"seed": 0})
        except CheckpointError as error:
            errors.append(str(error))
        else:
            assert (read.rows, read.settings) == (log.rows, log.settings)
    assert len(errors) > 20
    assert all(str(log.path) in message for message in errors)
