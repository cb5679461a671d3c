# SPDX-License-Identifier: Apache-2.0
"""A head that fits nothing is told from one that fits, once and in time."""

import pytest

from heterospec_vllm.observe import alarm as module
from heterospec_vllm.observe.alarm import WINDOW, AcceptanceAlarm


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings, as they read."""
    found: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *args: found.append(text % args))
    return found


def test_a_head_of_another_model(said) -> None:
    alarm = AcceptanceAlarm()
    for step in range(WINDOW // 4):
        assert not alarm.on, step
        alarm.walked(4, int(step == 3))
    assert alarm.on
    for _ in range(3 * WINDOW):
        alarm.walked(1, 0)
    [text] = said
    assert f"the last {WINDOW} drafts 1 tokens" in text
    assert all(cause in text for cause in ("another model", "aux layers", "chat template"))


@pytest.mark.parametrize("accepted", [0.05, 0.5, 3])
def test_a_head_that_fits(said, accepted) -> None:
    alarm = AcceptanceAlarm()
    for step in range(5 * WINDOW):
        alarm.walked(1, int((step + 1) * accepted) - int(step * accepted))
    assert not alarm.on and not said


def test_it_ends_when_drafts_are_accepted_again(said) -> None:
    alarm = AcceptanceAlarm()
    for num_accepted in (0, 2, 0):
        for _ in range(WINDOW):
            alarm.walked(1, num_accepted)
        assert alarm.on == (num_accepted == 0)
    assert len(said) == 1
