"""What the notebook and a rank tell each other, as plain data."""

from dataclasses import dataclass


@dataclass
class Setup:
    """How one rank takes part.

    Attributes:
        rendezvous: with one host the start of a path, else "host:port" of a store in rank 0.
        keep_groups: leave the groups of a failed call alone; their destruction can block on NCCL,
            and the rank will be ended anyway.
        umask: the notebook's, which files a function writes shall have.
    """

    rank: int
    world: int
    local_rank: int
    ranks_here: int
    device: str
    backend: str
    rendezvous: str
    one_host: bool
    keep_groups: bool
    umask: int


@dataclass
class Frame:
    """One line of a rank's stack; the notebook knows the source of its own cells."""

    filename: str
    line: int
    function: str
    source: str


@dataclass
class Failure:
    """An exception in a rank, as plain data.

    Attributes:
        name, text: the exception's class, and how Python prints it ("ValueError: no").
        frames: outermost first; of a long stack its two ends.
        skipped: how many frames are left out between them.
        consequence: a peer closed a connection, so the cause is elsewhere.
        time: when, in seconds since the epoch.
        parent: the exception it was raised from or while handling.
        parent_skipped: there is one, too far back to be told.
        members: of an exception group; the first ones.
        members_skipped: how many more it has.
    """

    name: str
    text: str
    frames: list[Frame]
    skipped: int
    consequence: bool
    time: float
    parent: "Failure | None"
    parent_skipped: bool
    members: "list[Failure]"
    members_skipped: int


@dataclass
class Answer:
    """How a call ended in one rank: exactly one of the first four is set.

    Attributes:
        value: the pickled result.
        failure: what the function raised.
        interrupted: where the rank was when it was told to stop.
        unsendable: why the result cannot be sent, naming its type.
        left: the function destroyed this rank's process group, or made another.
    """

    value: bytes | None = None
    failure: Failure | None = None
    interrupted: str | None = None
    unsendable: str | None = None
    left: bool = False
