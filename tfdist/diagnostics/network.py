"""Whether every task reaches every other, and what stands between them."""

from collections.abc import Mapping
from typing import Any

from tfdist.cluster.spec import split_address
from tfdist.diagnostics.findings import AllFacts, Finding, name_tasks, split_message

_MISSING_ISSUE = "https://github.com/tensorflow/tensorflow/issues/39922"
_PROXY_ISSUE = "https://github.com/tensorflow/tensorflow/issues/24887"
_DOOR_ISSUE = "https://github.com/tensorflow/tensorflow/blob/master/SECURITY.md"
_MAX_SKEW_SECS = 1.0


def check_network(facts: AllFacts) -> list[Finding]:
    """Looks at who has reached whom, and at the clocks."""
    findings = []
    for task, own in facts.items():
        findings += _check_own(task, own)
        for peer, seen in own["peers"].items():
            if seen["error"]:
                findings.append(_explain(task, peer, own, facts))
    return [*findings, *_check_isolation(facts), *_check_clocks(facts)]


def _check_own(task: str, own: Mapping[str, Any]) -> list[Finding]:
    findings = []
    if own["port_error"]:
        text, remedy = split_message(own["port_error"])
        findings.append(Finding("error", f"on {own['host']}: {text}", remedy))
    if own["proxied_hosts"]:
        hosts = ",".join(own["proxied_hosts"])
        text = f"{task} on {own['host']} would ask a proxy ({', '.join(own['proxies'])}) for {hosts}"
        findings.append(Finding("error", text, f"set no_grpc_proxy={hosts} there", _PROXY_ISSUE))
    return findings


def _explain(task: str, peer: str, own: Mapping[str, Any], facts: AllFacts) -> Finding:
    role, _, index = peer.partition(":")
    address = own["cluster"][role][int(index)]
    name = split_address(address)[0]
    where = f" on {facts[peer]['host']}" if peer in facts else ""
    reason = own["peers"][peer]["error"]
    remedies = {
        "its name does not resolve": f"add {name} to DNS or /etc/hosts there, or write its IP address",
        "Connection refused": "start the doctor on all tasks within --wait_secs of each other, or correct the address",
        "another program answers": "stop that program, or choose another port",
        "it knows another cluster": "give all tasks the same 'cluster'",
    }
    remedy = remedies.get(
        reason, f"open port {split_address(address)[1]} between the hosts, or mend the route"
    )
    if "answers there" in reason:
        remedy = f"{name} leads elsewhere as seen from there: correct DNS, /etc/hosts or the order"
    text = f"{task} on {own['host']} does not reach {peer}{where} at {address} ({reason})"
    return Finding("error", text, remedy, _MISSING_ISSUE)


def _check_isolation(facts: AllFacts) -> list[Finding]:
    tasks = [task for task, own in facts.items() if own["is_open"]]
    if not tasks:
        return []
    text = f"the servers of {name_tasks(tasks, facts)} would obey anyone who can connect"
    remedy = "put a firewall before them, or name their own network by --listen_interface (docs/security.md)"
    return [Finding("warning", text, remedy, _DOOR_ISSUE)]


def _check_clocks(facts: AllFacts) -> list[Finding]:
    findings = []
    first = next(iter(facts), "")
    # One clock is enough to compare with.
    for peer, seen in facts[first]["peers"].items() if first else ():
        skew = seen.get("skew_secs", 0.0)
        if seen["error"] is None and abs(skew) > _MAX_SKEW_SECS:
            where = name_tasks([peer], facts) if peer in facts else peer
            side = "ahead of" if skew > 0 else "behind"
            text = f"the clock of {where} is {abs(skew):.1f} s {side} {name_tasks([first], facts)}"
            findings.append(Finding("warning", text, "let NTP set both (timedatectl set-ntp true)"))
    return findings
