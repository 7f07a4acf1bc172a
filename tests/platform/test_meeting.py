"""How the processes of a job find each other: threads where nothing but sockets is asked, processes for signals."""

import multiprocessing
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from small_run import wait_until

from megatron_encdec.platform import gathering, meeting
from megatron_encdec.platform.errors import AgreedError, NotMet, RunFailed, UserError, exit_code
from megatron_encdec.platform.link import interface_towards
from megatron_encdec.platform.meeting import Party
from megatron_encdec.platform.ranks import RankEnvironment, Step, host_name, hosts_of
from megatron_encdec.platform.signals import StopSignals

STEP = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_JOB_NODELIST": "node[1-4]",
        "SLURM_STEP_NODELIST": "node[2-3]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}


@pytest.fixture
def port() -> int:
    """The first of some free ports."""
    return meeting.port_of(os.urandom(8).hex())


@pytest.fixture
def party(port, monkeypatch):
    """A function: member `member` of `members` ranks, who wait for two seconds at most."""
    monkeypatch.setenv(meeting.SECONDS, "2")
    monkeypatch.setattr(gathering, "REPLY_SECONDS", 0.5)
    monkeypatch.setattr(gathering, "TELL_SECONDS", 3.0)

    def call(member: int, members: int, job: str = "a", address: str = "127.0.0.1", **terms) -> Party:
        return Party(job, "rank", member, members, address, port, {"ranks": members, **terms})

    return call


@pytest.fixture
def at_once():
    """A function: work in a thread, begun."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit


def meet(party: Party, offer: dict | None = None) -> meeting.Met:
    met = party.meet(offer)
    met.close()
    return met


def test_all_hear_what_the_first_one_offers(party, at_once):
    others = [at_once(meet, party(member, 4)) for member in (3, 1, 2)]
    time.sleep(0.2)  # they come first, and try again
    first = meet(party(0, 4), {"store": 7})
    assert sorted(first.links) == [1, 2, 3]
    for met in (first, *(other.result() for other in others)):
        assert (met.offer, met.address, met.hosts) == ({"store": 7}, "127.0.0.1", {"127.0.0.1": host_name()})


def test_two_jobs_at_one_port_both_find_their_own(party, at_once):
    """A stranger does not complete the count, whoever comes first."""
    a_0, b_1 = at_once(meet, party(0, 2, "a"), {"job": "a"}), at_once(meet, party(1, 2, "b"))
    time.sleep(0.5)
    assert not a_0.done() and not b_1.done()
    b_0 = at_once(meet, party(0, 2, "b"), {"job": "b"})
    assert b_0.result().offer == b_1.result().offer == {"job": "b"} and not a_0.done()
    assert meet(party(1, 2, "a")).offer == a_0.result().offer == {"job": "a"}


def test_a_port_that_another_program_has_is_passed_over(party, port, at_once):
    with socket.create_server(("", port), backlog=4):  # and never answers
        first, other = at_once(meet, party(0, 2), {"store": 7}), at_once(meet, party(1, 2))
        assert other.result().offer == first.result().offer


def test_nonsense_and_who_goes_again_do_not_count(party, port, at_once, capfd):
    first = at_once(meet, party(0, 2), {})
    half = b'{"job": "a", "member": 1, "host": "h", "terms": {"ranks": 2}'
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n{}\n", half, half + b"}\n"):
        connection = _connected(port)
        connection.sendall(said)
        connection.close()
    time.sleep(0.3)
    assert not first.done()
    meet(party(1, 2))
    assert first.result().links.keys() == {1}
    assert "rank 1 on h had come and is gone; waiting for it to come again" in capfd.readouterr().err


def _connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.02)


def test_who_has_not_come_is_named_to_those_that_have(party, at_once, monkeypatch, capfd, port):
    monkeypatch.setattr(gathering, "NOTICE_SECONDS", 0.7)
    stranger, other = at_once(meet, party(2, 5, "b")), at_once(meet, party(1, 5))
    with pytest.raises(NotMet) as error:
        meet(party(0, 5))
    missing = f"3 of 5 ranks have not come to 127.0.0.1:{port}: rank 2-4; {host_name()} came for another job, b"
    assert str(error.value) == f"after 2 s {missing}"
    assert str(other.exception()) == str(error.value) and isinstance(other.exception(), RunFailed)
    assert f"another job meets at port {port}: a" in str(stranger.exception())
    err = capfd.readouterr().err
    assert err.count("3 of 5 ranks have not come") >= 2 and f"megatron-encdec: after 1 s {missing}; giving up" in err


def test_under_slurm_the_hosts_nobody_came_from_are_named(party, monkeypatch):
    for name, value in {**STEP, "SLURMD_NODENAME": "node2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotMet, match=r"rank 1 \(none from node3\)"):
        meet(party(0, 2))


@pytest.mark.parametrize(("address", "why"), [("127.0.0.9", "Connection refused"), ("no.such.host.invalid", "[Nn]ame")])
def test_a_wrong_address_is_one_line_after_a_stated_time(address, why, party, port, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert exit_code(meet, party(1, 2, address=address)) == 1
    assert re.fullmatch(rf"megatron-encdec: rank 1 on {host_name()} finds nobody of its job \(a\) at "
                        rf"{address}:{port}-\d+: .*{why}.*, within 2 s; MASTER_ADDR has to name the host of rank 0\n",
                        capfd.readouterr().err)


def test_the_first_one_says_that_the_address_is_not_its_own(party):
    with pytest.raises(NotMet, match="192.0.2.7 is no address of this host"):
        meet(party(0, 2, address="192.0.2.7"))


@pytest.mark.parametrize(("others", "said"), [
    ([{"members": 3}], "rank 1 on {0} was started with ranks 3, rank 0 on {0} with ranks 2"),
    ([{"nproc": 4}], "rank 1 on {0} was started with ranks 2, nproc 4, rank 0 on {0} with ranks 2"),
])
def test_other_numbers_are_refused(others, said, party, at_once):
    other = at_once(meet, party(1, **{"members": 2, **others[0]}))
    with pytest.raises(AgreedError) as error:
        meet(party(0, 2))
    assert said.format(host_name()) in str(error.value) == str(other.exception())


def test_two_that_say_they_are_the_same_are_refused(party, at_once):
    first, one = at_once(meet, party(0, 3)), at_once(meet, party(1, 3))
    time.sleep(0.3)
    with pytest.raises(AgreedError, match="two processes say they are rank 1 of 3"):
        meet(party(1, 3))
    assert isinstance(first.exception(), AgreedError) and isinstance(one.exception(), AgreedError)


def mistaken(party: Party, text: str | None) -> meeting.Met:
    with party.telling():
        if text:
            raise UserError(text)
    return meet(party)


def test_a_mistake_of_one_ends_all(party, at_once):
    began = time.monotonic()
    ranks = [at_once(mistaken, party(member, 3), "no data" if member == 2 else None) for member in range(3)]
    errors = [rank.exception() for rank in ranks]
    assert [type(error) for error in errors] == [AgreedError, AgreedError, UserError]
    assert str(errors[0]) == str(errors[1]) == f"rank 2 on {host_name()}: no data"
    assert time.monotonic() - began < 2


def test_a_mistake_of_all_is_said_by_the_first(party, at_once):
    ranks = [at_once(mistaken, party(member, 3), "no data") for member in range(3)]
    errors = [rank.exception() for rank in ranks]
    assert [type(error) for error in errors] == [UserError, AgreedError, AgreedError]
    assert {str(error) for error in errors} == {"no data"}


def _member(party: Party, said: str) -> None:
    gathering.NOTICE_SECONDS = 0.2
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def work() -> int:
        with StopSignals() as signals:
            party.meet({}, signals)
        return 0

    os._exit(exit_code(work))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_wait_at_once(victim, number, party, tmp_path, monkeypatch):
    monkeypatch.setenv(meeting.SECONDS, "300")
    context = multiprocessing.get_context("spawn")
    first = tmp_path / "0"
    members = [context.Process(target=_member, args=(party(member, 3), str(tmp_path / str(member))))
               for member in (0, 1)]
    for member in members:
        member.start()
    wait_until(lambda: first.exists() and "1 of 3 ranks have not come" in first.read_text(), "rank 1")
    os.kill(members[victim].pid, number)
    members[victim].join(30)
    text = (tmp_path / str(victim)).read_text()
    if number == signal.SIGINT:
        assert members[victim].exitcode == 130 and text.endswith("megatron-encdec: interrupted\n")
    else:
        said = f"stopped by {number.name} on {host_name()} before all ranks had met; nothing was to be saved"
        assert said in text
        other = members[1 - victim]
        other.join(30)
        assert [member.exitcode for member in members] == [0, 0]
        assert said in (tmp_path / str(1 - victim)).read_text()
    for member in members:
        member.kill()
        member.join()


def test_the_interface_is_the_one_that_has_the_way():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("127.0.1.1") == "lo"
    assert interface_towards("not an address") is None


def test_a_step_counts_and_a_batch_script_does_not(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert RankEnvironment.read() == RankEnvironment(1, 2, 0)
    step = Step.read()
    assert (step.name, step.tasks_of_node, step.hosts) == ("12.3.0", (1, 1), ("node2", "node3"))
    party = Party.of_ranks(RankEnvironment.read(), "runs/a")
    assert (party.job, party.address, party.member, party.members) == ("Slurm 12.3.0", "node2", 1, 2)
    assert 20000 <= party.port < 32000
    monkeypatch.setenv("SLURM_STEP_ID", "4")
    assert Party.of_ranks(RankEnvironment.read(), "runs/a").port != party.port
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.9")
    monkeypatch.setenv("MASTER_PORT", "4000")
    party = Party.of_ranks(RankEnvironment.read(), "runs/a")
    assert (party.address, party.port) == ("10.0.0.9", 4000)
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert Step.read() is None and RankEnvironment.read() == RankEnvironment(0, 1, 0)


def test_names_of_hosts():
    assert hosts_of("a[1-2,07]b,c,n[01-02]x[1-2]") == ("a1b", "a2b", "a07b", "c", "n01x1", "n01x2", "n02x1", "n02x2")
    assert hosts_of("") == ()


def test_launchers_under_srun_say_a_common_mistake_once(party, at_once, monkeypatch, capfd):
    """All write to one place there; by hand each has a place of its own."""
    def ends(job: str) -> int:
        nodes = [replace(party(member, 2, job), unit="node") for member in range(2)]
        both = [at_once(exit_code, mistaken, node, "no data") for node in nodes]
        assert [one.result() for one in both] == [2, 2]
        return capfd.readouterr().err.count("no data")

    assert ends("by hand") == 2
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert ends("srun") == 1
