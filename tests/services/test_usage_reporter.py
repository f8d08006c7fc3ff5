"""A router tells every cache manager what was used, repeats what was not taken, and never waits for it."""

from dataclasses import dataclass, field

from darkroom.errors import StageUnavailable
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member
from darkroom.wire.graphs import DecodeWork, DenoiseWork, Node
from darkroom.wire.tasks import LoraUse
from darkroom.wire.usage import MAX_USAGES, UsageReport
from services.router.usage import _MAX_TRIES, UsageReporter
from tests.registry.following import running, until
from tests.services.routing import txt2img


@dataclass
class Listeners:
    """Managers by address; those that are deaf take reports and lose the answer."""

    deaf: set[str] = field(default_factory=set)
    heard: list[tuple[str, UsageReport]] = field(default_factory=list)

    async def report(self, address: str, report: UsageReport) -> None:
        self.heard.append((address, report))
        if address in self.deaf:
            raise StageUnavailable("cachemgr", "the answer was lost")

    def at(self, address: str) -> list[tuple[int, int]]:
        """Numbers of the reports heard at an address, and how many runs each counts."""
        return [(report.sequence, sum(u.count for u in report.usages)) for to, report in self.heard if to == address]


def denoise_node(*loras: str) -> Node:
    (node,) = [node for node in txt2img().nodes if isinstance(node.work, DenoiseWork)]
    work = node.work
    assert isinstance(work, DenoiseWork)
    uses = tuple(LoraUse(lora_id=name, scale=1.0) for name in loras)
    changed = {**{name: getattr(work, name) for name in work.__slots__}, "loras": uses}
    return Node(node.node_id, DenoiseWork(**changed), node.sources)


def decode_node(model_id: str) -> Node:
    return Node("decode", DecodeWork(model_id=model_id), {})


async def test_every_manager_hears_everything_and_what_is_lost_is_repeated_as_it_was() -> None:
    registry = MemoryRegistry()
    view, listeners = ClusterView(registry), Listeners()
    members = [Member(replica_id=f"cachemgr-{n}", stage="cachemgr", address=f"h:{n}") for n in (1, 2)]
    one, two = [Registration(registry, member) for member in members]
    reporter = UsageReporter("router-1", view, listeners)
    async with running(view.run()), running(one.run()), running(two.run()):
        await until(lambda: len(view.members("cachemgr")) == 2)
        await reporter.report({})
        assert listeners.heard == [], "there is nothing to say"
        reporter.add(denoise_node("ink"), 1.5)
        listeners.deaf = {"h:2"}
        await reporter.report({"denoiser-1": 1})
        reporter.add(decode_node("sd"), 0.5)
        await reporter.report({})
        assert [count for _, count in listeners.at("h:1")] == [1, 1]
        assert len(set(listeners.at("h:2"))) == 1, "the same report again"
        listeners.deaf = set()
        await reporter.report({})
        await reporter.report({})
        assert len(listeners.at("h:2")) == 4
        assert listeners.at("h:2")[0] == listeners.at("h:2")[2]
        assert listeners.at("h:2")[-1][0] > listeners.at("h:2")[0][0]
        assert listeners.at("h:2")[-1][1] == 1
        report = listeners.heard[0][1]
        assert (report.usages[0].run_s, report.usages[0].loras) == (1.5, (("ink", 1),))
        assert report.loads == (("denoiser-1", 1),)
        count = len(listeners.heard)
        await reporter.report({})
        await reporter.report({})
        assert len(listeners.heard) <= count + 2, "the end of being busy is said once"


async def test_what_a_deaf_manager_misses_is_bounded_and_in_the_end_thrown_away() -> None:
    registry = MemoryRegistry()
    view, listeners = ClusterView(registry), Listeners(deaf={"h:1"})
    member = Registration(registry, Member(replica_id="cachemgr-1", stage="cachemgr", address="h:1"))
    reporter = UsageReporter("router-1", view, listeners)
    async with running(view.run()), running(member.run()):
        await until(lambda: bool(view.members("cachemgr")))
        for number in range(3 * MAX_USAGES):
            reporter.add(decode_node(f"m{number}"), 0.1)
        for _ in range(_MAX_TRIES + 1):
            await reporter.report({})
            reporter.add(decode_node("sd"), 0.1)
        sequences = [sequence for sequence, _ in listeners.at("h:1")]
        assert sequences == [1] * _MAX_TRIES + [2]
        assert max(count for _, count in listeners.at("h:1")) <= MAX_USAGES
        assert listeners.at("h:1")[-1][1] == _MAX_TRIES
