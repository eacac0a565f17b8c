"""Hosts as people write them, and who goes where."""

import json
import re

import pytest

from tfdist.cluster.spec import Task
from tfdist.errors import ConfigError
from tfdist.launch import main
from tfdist.launcher.hosts import Host, SshOptions, parse_host_file, parse_hosts, place_tasks, read_hosts
from tfdist.launcher.ssh import frames
from tfdist.launcher.ssh.executors import carried, render_ssh


def pairs(hosts):
    return [(host.name, host.num_slots) for host in hosts]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("h1:2,h2:4", [("h1", 2), ("h2", 4)]),
        ("h1, h2", [("h1", 1), ("h2", 1)]),
        ("user@h1:3", [("user@h1", 3)]),
        ("192.0.2.7:2", [("192.0.2.7", 2)]),
        ("[fd00::1]:2,fd00::2", [("fd00::1", 2), ("fd00::2", 1)]),
    ],
)
def test_hosts_are_read_as_horovodrun_does(text, found):
    assert pairs(parse_hosts(text)) == found


def test_host_file_is_read_as_horovodrun_and_open_mpi_do():
    text = "# all of them\nh1 slots=2\n\nh2 slots=4 max_slots=8 # the large one\nh3\nh4:2\n"
    assert pairs(parse_host_file(text)) == [("h1", 2), ("h2", 4), ("h3", 1), ("h4", 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h1:0", "'0' slots: it must be a number of at least 1"),
        ("h1:two", "'two' slots"),
        ("h1,,h2", "write name:slots"),
        ("h1:2,h1:1", "'h1' comes twice"),
        ("-oProxyCommand=x", "write name:slots"),
        ("[fd00::1]2", "write name:slots"),
    ],
)
def test_mistake_in_a_list_of_hosts_is_one_line(text, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse_hosts(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("h1 cores=2", "host slots=N"), ("h1 slots=no", "'no' slots"), ("# nobody", "no hosts")],
)
def test_mistake_in_a_host_file_is_one_line(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_host_file(text)


def test_list_or_file_but_not_both(tmp_path):
    (tmp_path / "hosts").write_text("h1\n")
    assert pairs(read_hosts(None, str(tmp_path / "hosts"))) == [("h1", 1)]
    assert read_hosts(None, None) == ()
    with pytest.raises(ConfigError, match="give one of them"):
        read_hosts("h1", str(tmp_path / "hosts"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hosts(None, str(tmp_path / "none"))


def test_workers_fill_slots_and_ps_take_turns():
    hosts = [Host(name="a", num_slots=2), Host(name="b"), Host(name="c", num_slots=2)]
    tasks = [Task("chief", 0), *(Task("worker", i) for i in range(5)), *(Task("ps", i) for i in range(4))]
    places = {str(task): host.name for task, host in place_tasks(tasks, hosts).items()}
    assert places["chief:0"] == "a"
    assert [places[f"worker:{i}"] for i in range(5)] == ["a", "a", "b", "c", "c"]
    assert [places[f"ps:{i}"] for i in range(4)] == ["a", "b", "c", "a"]
    with pytest.raises(ConfigError, match="6 workers for 5 slots"):
        place_tasks([Task("worker", i) for i in range(6)], hosts)


def test_command_holds_what_was_chosen_and_leaves_the_rest_to_ssh():
    plain = render_ssh(Host(name="h1"), SshOptions(), folder="/work/a b", python_path=None)
    assert "-p" not in plain and "-i" not in plain and "-F" not in plain
    assert not any("StrictHostKeyChecking" in word for word in plain)
    assert plain[-1].startswith("cd '/work/a b' && exec ")
    chosen = SshOptions(ssh_port=2222, identity_file="key", ssh_config="config", python="/opt/py")
    words = render_ssh(Host(name="h1"), chosen, folder="/", python_path="/src")
    assert [words[words.index(flag) + 1] for flag in ("-p", "-i", "-F")] == ["2222", "key", "config"]
    assert words[-1] == "cd / && exec env PYTHONPATH=/src /opt/py -m tfdist.launcher.ssh.agent"


def test_environment_is_carried_but_for_what_belongs_to_a_session():
    env = {"MY_KEY": "1", "PATH": "/bin", "HOME": "/root", "SSH_AUTH_SOCK": "x", "TERM": "dumb", "TF_X": "2"}
    assert carried(env) == {"MY_KEY": "1", "PATH": "/bin", "TF_X": "2"}


def test_frames_come_out_however_they_were_cut():
    said = [(frames.STDOUT, b"hello\n"), (frames.BEAT, b""), (frames.STDERR, bytes(range(256)) * 300)]
    data = b"Welcome to h1!\r\n" + frames.START + b"".join(frames.render_frame(*frame) for frame in said)
    for size in (1, 7, len(data)):
        reader = frames.FrameReader()
        found = [frame for i in range(0, len(data), size) for frame in reader.feed(data[i : i + size])]
        assert found == said


def test_dry_run_shows_the_hosts_and_connects_to_none(capsys):
    assert main(["--hosts=no-such-a:2,no-such-b", "--num_ps=1", "--dry_run", "--", "true"]) == 0
    (config, *others) = re.findall(r"TF_CONFIG='(.*?)'", capsys.readouterr().out)
    cluster = json.loads(config)["cluster"]
    hosts = {role: [a.rpartition(":")[0] for a in own] for role, own in cluster.items()}
    assert hosts == {
        "chief": ["no-such-a"],
        "worker": ["no-such-a", "no-such-a", "no-such-b"],
        "ps": ["no-such-a"],
    }
    assert len({address for own in cluster.values() for address in own}) == 5 == len(others) + 1
