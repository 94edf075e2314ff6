"""gdb commands for the levels of a machine: nvmx (L1), the guest hypervisor (L2), its guest (L3).

`./nvmx run --gdb` starts Bochs with a gdb stub and writes a file for `gdb -x` that loads this one. The stub knows one
processor and whoever runs on it; this file knows that others are behind it, by the VMCSs that the processor has seen.
Source of the encodings and of the walks: Intel SDM vol. 3D, appendix "Field Encoding in VMCS"; vol. 3A, "Paging"; vol. 3C,
"The Extended Page Table Mechanism (EPT)".
"""

import gdb

GUEST = {
    "rip": 0x681E, "rsp": 0x681C, "rflags": 0x6820, "cr0": 0x6800, "cr3": 0x6802, "cr4": 0x6804, "efer": 0x2806,
    "cs": 0x0802, "cs base": 0x6808, "ss": 0x0804, "gdtr base": 0x6816, "idtr base": 0x6818, "tr": 0x080E,
}
HOST = {
    "rip": 0x6C16, "rsp": 0x6C14, "cr0": 0x6C00, "cr3": 0x6C02, "cr4": 0x6C04, "efer": 0x2C02, "cs": 0x0C02,
    "ss": 0x0C04, "gdtr base": 0x6C0C, "idtr base": 0x6C0E, "tr": 0x0C0C,
}
PRIMARY, SECONDARY, EPTP = 0x4002, 0x401E, 0x201A
# As nvmx's exit path stores a guest's registers, below where HOST_RSP points.
GPR = ["rax", "rcx", "rdx", "rbx", None, "rbp", "rsi", "rdi"] + ["r%d" % n for n in range(8, 16)]
ADDRESS = 0x000F_FFFF_FFFF_F000


class Machine:
    """What the stub's monitor says."""

    # The level of who is in VMX root operation: 1 with nvmx, 2 without.
    root = 1

    @staticmethod
    def ask(command):
        return gdb.execute("monitor " + command, to_string=True).strip()

    def state(self):
        words = dict(word.split("=", 1) for word in self.ask("state").split())
        seen = [int(at, 16) for at in words.pop("seen", "").split(",") if at]
        state = {key: int(value, 0) for key, value in words.items()}
        state["seen"] = seen
        return state

    def field(self, vmcs, encoding):
        text = self.ask("field %x %x" % (vmcs, encoding))
        return None if text == "?" else int(text, 16)

    def physical(self, at, count):
        """Bytes of the machine's memory."""
        out = bytearray()
        while len(out) < count:
            piece = min(128, count - len(out), 4096 - (at + len(out)) % 4096)
            text = self.ask("phys %x %x" % (at + len(out), piece))
            if text == "?":
                raise gdb.GdbError("no memory at %#x" % (at + len(out)))
            out += bytes.fromhex(text)
        return bytes(out)

    def level_of(self, state, vmcs):
        """A CPU enters first the VMCS of the level above the root, then those of the rest."""
        rank = state["seen"].index(vmcs) if vmcs in state["seen"] else 0
        return self.root + 1 if self.root == 1 and rank == 0 else 3

    def running(self, state):
        return self.level_of(state, state["vmcs"]) if state["guest"] else self.root

    def vmcs_of(self, state, level):
        """The VMCS that runs a level: the current one if it does, else the one that was met last."""
        of = [at for at in state["seen"] if self.level_of(state, at) == level]
        if not of:
            raise gdb.GdbError("L%d has not run yet" % level)
        return state["vmcs"] if state["vmcs"] in of else of[-1]


machine = Machine()


def level_named(text):
    digits = text.lstrip("lL")
    if digits not in ("1", "2", "3") or int(digits) < machine.root:
        raise gdb.GdbError("`%s` is no level here: L%d to L3" % (text, machine.root))
    return int(digits)


def number(text):
    return int(gdb.parse_and_eval(text)) & (1 << 64) - 1


class Space:
    """The memory of a level."""

    def __init__(self, level):
        state = machine.state()
        self.level, self.steps = level, []
        root = level == machine.root
        self.vmcs = None if root else machine.vmcs_of(state, level)
        if machine.running(state) == level:
            live = {key: state[key] for key in ("cr0", "cr3", "cr4", "efer")}
        else:
            fields, at = (HOST, state["vmcs"]) if root else (GUEST, self.vmcs)
            live = {key: machine.field(at, fields[key]) for key in ("cr0", "cr3", "cr4", "efer")}
        self.cr0, self.cr3, self.cr4, self.efer = (live[key] or 0 for key in ("cr0", "cr3", "cr4", "efer"))
        self.eptp = None
        if not root and machine.field(self.vmcs, PRIMARY) >> 31 & 1 and machine.field(self.vmcs, SECONDARY) & 2:
            self.eptp = machine.field(self.vmcs, EPTP)
        # What L2 wants of L3's memory, where nvmx has composed nothing yet.
        self.ept12 = state["ept12"] if level == 3 and machine.root == 1 else 0

    def to_host(self, at):
        """A physical address of the level as one of the machine."""
        if self.eptp is None:
            return at
        found = ept(self.eptp, at, lambda a: a, self.steps, "EPT")
        if found is None and self.ept12:
            below = Space(2)
            there = ept(self.ept12, at, below.to_host, self.steps, "ept12")
            found = None if there is None else below.to_host(there)
        if found is None:
            raise gdb.GdbError("%#x is not in the EPT of L%d" % (at, self.level))
        return found

    def entry(self, table, index, bytes_each=8):
        at = self.to_host(table + index * bytes_each)
        return int.from_bytes(machine.physical(at, bytes_each), "little")

    def to_physical(self, linear):
        """A linear address as a physical one of the level."""
        if not self.cr0 >> 31 & 1:
            return linear
        if self.cr4 & 1 << 5:
            levels = (5 if self.cr4 & 1 << 12 else 4) if self.efer & 1 << 10 else 3
            bits, bytes_each, table = 9, 8, self.cr3 & (ADDRESS if levels > 3 else 0xFFFF_FFE0)
        else:
            levels, bits, bytes_each, table = 2, 10, 4, self.cr3 & 0xFFFF_F000
        for depth in range(levels, 0, -1):
            shift = 12 + bits * (depth - 1)
            index = linear >> shift & (1 << (2 if levels == 3 and depth == 3 else bits)) - 1
            entry = self.entry(table, index, bytes_each)
            self.steps.append("paging, level %d: entry %d at %#x = %#x" % (depth, index, table + index * bytes_each, entry))
            if not entry & 1:
                raise gdb.GdbError("%#x is not mapped for L%d" % (linear, self.level))
            large = depth > 1 and entry & 1 << 7 and not (levels == 3 and depth == 3)
            if large or depth == 1:
                page = (1 << shift) - 1
                return entry & ADDRESS & ~page | linear & page
            table = entry & ADDRESS
        raise gdb.GdbError("no page")

    def read(self, linear, count):
        out = b""
        while len(out) < count:
            at = linear + len(out)
            piece = min(count - len(out), 4096 - at % 4096)
            out += machine.physical(self.to_host(self.to_physical(at)), piece)
        return out


def ept(eptp, at, place, steps, name):
    """Walks an EPT whose tables lie where `place` says; None where an entry is missing."""
    table = eptp & ADDRESS
    for depth in range((eptp >> 3 & 7) + 1, 0, -1):
        shift = 12 + 9 * (depth - 1)
        here = place(table + (at >> shift & 511) * 8)
        if here is None:
            return None
        entry = int.from_bytes(machine.physical(here, 8), "little")
        steps.append("%s, level %d: entry %d at %#x = %#x" % (name, depth, at >> shift & 511, here, entry))
        if not entry & 7:
            return None
        if depth == 1 or depth < 4 and entry & 1 << 7:
            page = (1 << shift) - 1
            return entry & ADDRESS & ~page | at & page
        table = entry & ADDRESS
    return None


class Prefix(gdb.Command):
    """The levels of the machine: where, stop, break, regs, x, walk, vmcs, levels."""

    def __init__(self):
        super().__init__("nvmx", gdb.COMMAND_USER, gdb.COMPLETE_NONE, True)


class Named(gdb.Command):
    def __init__(self, name):
        super().__init__("nvmx " + name, gdb.COMMAND_USER)

    def invoke(self, text, _from_tty):
        self.run(gdb.string_to_argv(text))


def level_argument(words):
    if not words:
        return machine.running(machine.state())
    return level_named(words[0])


class Where(Named):
    """Which level runs, and which VMCSs there are: nvmx where"""

    def run(self, _words):
        state = machine.state()
        print("L%d runs at %#x, after %d ticks" % (machine.running(state), number("$pc"), state["ticks"]))
        for at in state["seen"]:
            current = ", current" if at == state["vmcs"] else ""
            rip = machine.field(at, GUEST["rip"])
            print("VMCS %#x runs L%d, left at %#x%s" % (at, machine.level_of(state, at), rip or 0, current))


class Stop(Named):
    """Go on until a level is entered, or nvmx is: nvmx stop L1|L2|L3"""

    def run(self, words):
        level = level_argument(words[:1] or ["L2"])
        if level == machine.root:
            set_up, undo = "exit 1", "exit 0"
        else:
            first, last = {2: (0, 0), 3: (1, 63)}[level] if machine.root == 1 else (0, 63)
            set_up, undo = "entry %d %d" % (first, last), "entry 1 0"
        machine.ask(set_up)
        gdb.execute("continue")
        machine.ask(undo)
        print("L%d runs at %#x" % (machine.running(machine.state()), number("$pc")))


class AtLevel(gdb.Breakpoint):
    """A breakpoint of one level: others have code at the same address."""

    def __init__(self, place, level):
        super().__init__(place)
        self.level = level

    def stop(self):
        return machine.running(machine.state()) == self.level


class Break(Named):
    """A breakpoint that counts for one level: nvmx break L2 kit_exited"""

    def run(self, words):
        if len(words) != 2:
            raise gdb.GdbError("nvmx break LEVEL LOCATION")
        AtLevel(words[1], level_named(words[0]))


class Regs(Named):
    """Registers of a level, whether it runs or not: nvmx regs [LEVEL]"""

    def run(self, words):
        level, state = level_argument(words), machine.state()
        running = machine.running(state)
        if level == running:
            gdb.execute("info registers")
            for key in ("cr0", "cr3", "cr4", "efer"):
                print("%-14s %#x" % (key, state[key]))
            return
        root = level == machine.root
        fields, at = (HOST, state["vmcs"]) if root else (GUEST, machine.vmcs_of(state, level))
        print("L%d, of the %s state of VMCS %#x" % (level, "host" if root else "guest", at))
        for name, encoding in fields.items():
            value = machine.field(at, encoding)
            print("%-14s %s" % (name, "-" if value is None else "%#x" % value))
        if root:
            print("Its general-purpose registers come back from its stack.")
        elif running != 1 or at != state["vmcs"]:
            # SDM vol. 3C, "Loading Guest State": no entry or exit switches them.
            print("General-purpose registers are not switched: L%d gets those that whoever runs leaves." % level)
        else:
            stored = Space(1).read(machine.field(at, HOST["rsp"]) - 8 * len(GPR), 8 * len(GPR))
            for n, name in enumerate(GPR):
                if name:
                    print("%-14s %#x" % (name, int.from_bytes(stored[8 * n : 8 * n + 8], "little")))


class Examine(Named):
    """Memory at a linear address of a level: nvmx x L3 ADDRESS [BYTES]"""

    def run(self, words):
        if len(words) not in (2, 3):
            raise gdb.GdbError("nvmx x LEVEL ADDRESS [BYTES]")
        at, count = number(words[1]), number(words[2]) if len(words) == 3 else 64
        bytes_there = Space(level_named(words[0])).read(at, count)
        for n in range(0, count, 16):
            print("%#018x  %s" % (at + n, bytes_there[n : n + 16].hex(" ", 1)))


class Walk(Named):
    """Each step from a linear address of a level to the machine's memory: nvmx walk L3 ADDRESS"""

    def run(self, words):
        if len(words) != 2:
            raise gdb.GdbError("nvmx walk LEVEL ADDRESS")
        space, linear = Space(level_named(words[0])), number(words[1])
        try:
            physical = space.to_physical(linear)
            host = space.to_host(physical)
        finally:
            for step in space.steps:
                print(step)
        print("linear %#x is physical %#x of L%d, %#x of the machine" % (linear, physical, space.level, host))
        if machine.root == 1 and space.level == 3:
            self.composed(physical)

    @staticmethod
    def composed(physical):
        """The same by L2's own tables: ept12, then ept01."""
        pointer = machine.state()["ept12"]
        if not pointer:
            return
        below, steps = Space(2), []
        there = ept(pointer, physical, below.to_host, steps, "ept12")
        for step in steps:
            print(step)
        if there is None:
            print("ept12 (%#x, the last that L2 wrote) has nothing there" % pointer)
            return
        same = below.to_host(there)
        filled = ept(machine.field(machine.vmcs_of(machine.state(), 3), EPTP), physical, lambda a: a, [], "ept02")
        if filled is None:
            verdict = "ept02 has nothing there yet"
        else:
            verdict = "as ept02 has it" if same == filled else "ept02 has %#x" % filled
        print("by ept12 (%#x) it is %#x of L2, by ept01 %#x of the machine: %s" % (pointer, there, same, verdict))


class Vmcs(Named):
    """A field of the VMCS that runs a level: nvmx vmcs L3 0x6802"""

    def run(self, words):
        if len(words) != 2:
            raise gdb.GdbError("nvmx vmcs LEVEL ENCODING")
        at = machine.vmcs_of(machine.state(), level_named(words[0]))
        value = machine.field(at, number(words[1]))
        print("VMCS %#x: %s" % (at, "no such field" if value is None else "%#x" % value))


class Levels(Named):
    """Whether nvmx is on the machine: nvmx levels nvmx|bare"""

    def run(self, words):
        if words not in (["nvmx"], ["bare"]):
            raise gdb.GdbError("nvmx levels nvmx|bare")
        machine.root = 1 if words == ["nvmx"] else 2


Prefix()
for command, name in [
    (Where, "where"), (Stop, "stop"), (Break, "break"), (Regs, "regs"), (Examine, "x"), (Walk, "walk"), (Vmcs, "vmcs"),
    (Levels, "levels"),
]:
    command(name)
