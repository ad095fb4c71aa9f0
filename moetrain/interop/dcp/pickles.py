"""Data of a pickle, without running it.

A pickle is a program: `pickle.load` imports any name that it holds and calls it. Here its opcodes are read by
`pickletools.genops`, which runs nothing, and this file interprets those that build data:

    plain values    None, bool, int, float, str, bytes, tuple, list, dict, set
    Name            a class or function by its module and name, which is never imported
    Record          an object of a known class, or the call of a known function: its arguments and its state

The caller says which names it knows. Every other name, opcode and shape raises PickleError, which says what
it is. Time and memory stay proportional to the length of the pickle:

    nesting         at most MOST_DEPTH containers inside each other, and none inside itself
    keys            of dicts and sets: texts, small numbers, None, or records that `key` turns into a text; so
                    no key costs more than another to hash, and none can be made to collide with many
    numbers         at most MOST_BITS bits
    opcodes         at most MOST_OPCODES
    shared parts    stay shared; whoever walks the result must expect that one part is there many times
"""

import gc
import pickletools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

MOST_DEPTH = 32
MOST_BITS = 256
MOST_OPCODES = 50_000_000  # 1.5 million chunks of tensors

_LARGEST_KEY = 1 << 60     # below it an int is its own hash
_MARK = object()
DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict"})  # read as dicts


class PickleError(ValueError):
    """A pickle is damaged, or holds what its reader does not know."""


class Name(NamedTuple):
    """A class, function or constant that a pickle names: `torch.Size`."""

    text: str


class Items(list[Any]):
    """A list, with the number of containers inside each other; `closed` once another container holds it."""

    __slots__ = ("closed", "depth")

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.closed = 1, False


class Fields(dict[Any, Any]):
    """A dict, with the same marks."""

    __slots__ = ("closed", "depth")

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.closed = 1, False


class Record:
    """An object that a pickle builds from a known name.

    Args:
        name: of its class, or of the function that returns it.
        arguments: what that is called with.
        depth: containers inside each other.
    """

    __slots__ = ("arguments", "closed", "depth", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...], depth: int) -> None:
        self.name, self.arguments, self.depth, self.closed = name, arguments, depth, False
        self.state: Any = None


_GROWING = (Items, Fields, Record)


def read_pickle(content: bytes, known: Collection[str], *, key: Callable[[Record], str] | None = None) -> Any:
    """Interpret a pickle.

    Args:
        content: the pickle.
        known: names that it may hold, as `module.name`.
        key: turns a record that is a key of a dict into a text.

    Returns:
        The value; objects are `Record`, names `Name`, an identifier of persistent data
        `Record("persistent")`.
    """
    collected = gc.isenabled()
    gc.disable()       # nothing here refers to itself, and looking for what does takes most of the time
    try:
        return _Machine(known, key).run(content)
    finally:
        if collected:
            gc.enable()


class _Machine:
    """Stack and memo of the interpreter."""

    def __init__(self, known: Collection[str], key: Callable[[Record], str] | None) -> None:
        self.known, self.key = known, key
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks: list[int] = []
        self.tuple_depths: dict[int, int] = {}  # by id, of tuples that hold containers

    def run(self, content: bytes) -> Any:
        count, most, place = 0, MOST_OPCODES, None
        try:
            for opcode, argument, place in pickletools.genops(content):
                method = _METHODS.get(opcode.name)
                if method is None:
                    break
                method(self, argument)
                count += 1
                if count > most:
                    raise PickleError(f"it has more than {most:,} opcodes")
            else:
                raise PickleError("it has no end")
        except PickleError:
            raise
        except (ValueError, OverflowError, IndexError, TypeError, KeyError) as error:
            raise PickleError(f"opcode {count} cannot be read: {str(error)[:200]}") from error
        if opcode.name != "STOP":
            raise PickleError(f"opcode {opcode.name} is none that a checkpoint holds")
        if len(self.stack) != 1 or place is None or place + 1 != len(content):
            raise PickleError("it does not end where its value is complete")
        return self.pop()

    def push(self, argument: Any) -> None:
        self.stack.append(argument)

    def push_long(self, argument: int) -> None:
        if argument.bit_length() > MOST_BITS:
            raise PickleError(f"it holds a number of {argument.bit_length()} bits")
        self.stack.append(argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("its stack is not in order")
        return value

    def above_mark(self) -> list[Any]:
        place = self.marks.pop()
        values = self.stack[place + 1:]
        del self.stack[place:]
        return values

    def held(self, values: Any) -> int:
        """Close `values`, which go into a container; returns the depth of that container."""
        depth = 1
        for value in values:
            if isinstance(value, _GROWING):
                value.closed = True
                depth = max(depth, value.depth + 1)
            elif isinstance(value, tuple):
                depth = max(depth, self.tuple_depths.get(id(value), 1) + 1)
        if depth > MOST_DEPTH:
            raise PickleError(f"its containers are nested more than {MOST_DEPTH} deep")
        return depth

    def grow(self, container: Any, kind: "type[Items | Fields | Record]", values: list[Any]) -> None:
        """Note that `values` go into a container, which must still be open and is none of them."""
        depth = self.held(values)
        if not isinstance(container, kind) or container.closed:
            raise PickleError("it changes a value that is already in use, as a checkpoint never does")
        container.depth = max(container.depth, depth)

    # Opcodes, by their names in pickletools.

    def mark(self, argument: Any) -> None:
        self.marks.append(len(self.stack))
        self.stack.append(_MARK)

    def push_tuple(self, value: tuple[Any, ...]) -> None:
        depth = self.held(value)
        if depth > 1:
            self.tuple_depths[id(value)] = depth
        else:
            self.tuple_depths.pop(id(value), None)
        self.stack.append(value)

    def append(self, argument: Any) -> None:
        self.extend([self.pop()])

    def appends(self, argument: Any) -> None:
        self.extend(self.above_mark())

    def extend(self, values: list[Any]) -> None:
        self.grow(self.stack[-1], Items, values)
        self.stack[-1].extend(values)

    def set_item(self, argument: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_pairs([key, value])

    def set_items(self, argument: Any) -> None:
        self.set_pairs(self.above_mark())

    def set_pairs(self, values: list[Any]) -> None:
        self.grow(self.stack[-1], Fields, values)
        if len(values) % 2:
            raise PickleError("a dict has a key without value")
        for key, value in zip(values[::2], values[1::2]):
            plain = self.plain_key(key)
            if plain in self.stack[-1]:
                raise PickleError(f"a dict has the key {str(plain)[:100]} twice")
            self.stack[-1][plain] = value

    def plain_key(self, key: Any) -> Any:
        """What stands for a key: itself if it is plain, or what `self.key` returns."""
        if isinstance(key, Record) and self.key is not None:
            return self.key(key)
        if isinstance(key, (str, bytes, type(None))) or isinstance(key, int) and abs(key) < _LARGEST_KEY:
            return key
        raise PickleError(f"a key is of the kind {type(key).__name__}")

    def add_items(self, argument: Any) -> None:
        values = self.above_mark()
        if not isinstance(self.stack[-1], set):
            raise PickleError("its stack is not in order")
        self.stack[-1].update(map(self.plain_key, values))

    def named(self, text: str) -> None:
        if text not in self.known:
            raise PickleError(f"it names {text[:200]}, which no checkpoint of tensors holds; nothing was run")
        self.stack.append(Name(text))

    def name_on_stack(self, argument: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("it names something by a value that is no text")
        self.named(f"{module}.{name}")

    def call(self, argument: Any) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or type(arguments) is not tuple:
            raise PickleError("it calls something that is no known name")
        if name.text in DICTS and all(isinstance(argument, Name) for argument in arguments):
            self.stack.append(Fields())
        else:
            self.stack.append(Record(name.text, arguments, self.held([arguments])))

    def build(self, argument: Any) -> None:
        state = self.pop()
        self.grow(self.stack[-1], Record, [state])
        if self.stack[-1].state is not None:
            raise PickleError("it sets the state of an object twice")
        self.stack[-1].state = state

    def persistent(self, argument: Any) -> None:
        value = self.pop()
        self.stack.append(Record("persistent", (value,), self.held([value])))

    def remember(self, argument: int | None) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise PickleError("its stack is not in order")
        self.memo[len(self.memo) if argument is None else argument] = value

    def recall(self, argument: int) -> None:
        self.stack.append(self.memo[argument])


def _constant(value: bool | None) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.push_tuple(tuple([machine.pop() for _ in range(count)][::-1]))


_PUSHED = ("BININT", "BININT1", "BININT2", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
           "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_PUSHED, _Machine.push),
    "LONG1": _Machine.push_long,
    "LONG4": _Machine.push_long,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "MARK": _Machine.mark,
    "EMPTY_TUPLE": lambda machine, argument: machine.push_tuple(()),
    "TUPLE": lambda machine, argument: machine.push_tuple(tuple(machine.above_mark())),
    "EMPTY_LIST": lambda machine, argument: machine.stack.append(Items()),
    "EMPTY_DICT": lambda machine, argument: machine.stack.append(Fields()),
    "EMPTY_SET": lambda machine, argument: machine.stack.append(set()),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": lambda machine, argument: machine.named(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
}
