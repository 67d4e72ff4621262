"""What launchers say in environment variables."""

import pytest

from linnet.errors import ConfigError
from linnet.parallel.launch import Launch, launched, lost_contact

HOST = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_process_on_its_own():
    assert launched({}) is None
    assert launched(HOST) is None
    assert launched({**HOST, "RANK": "0", "WORLD_SIZE": "1"}) is None
    # Variables of a job whose steps are not ranks.
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_torchrun():
    says = {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }
    assert launched({**HOST, **says}) == Launch(9, 16, 1, restarts=2, node_size=8)


def test_ray_train_and_slurm():
    ray = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched({**HOST, **ray}) == Launch(3, 4, 1, node_size=2)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert launched({**HOST, **slurm}) == Launch(5, 8, 1)


@pytest.mark.parametrize(
    "says",
    [
        {"RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
    ],
)
def test_half_a_launcher_is_refused_in_one_line(says):
    with pytest.raises(ConfigError) as error:
        launched({**HOST, **says})
    assert "RANK" in str(error.value) and "\n" not in str(error.value)


def test_a_meeting_at_port_zero_is_refused():
    with pytest.raises(ConfigError, match="MASTER_PORT is 0"):
        launched({**HOST, "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "2"})


def test_lost_contact_is_found_in_the_chain_of_errors():
    try:
        try:
            raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")
        except RuntimeError as inner:
            raise RuntimeError("stage 1 failed to run forward") from inner
    except RuntimeError as outer:
        assert lost_contact(outer) == "connection closed by peer"
    assert lost_contact(RuntimeError("expected fp32")) is None
