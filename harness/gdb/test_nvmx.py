"""Host tests of nvmx.py: a machine in a dictionary answers in place of the emulator's stub."""

import sys
import types
import unittest

HERE = __file__.rsplit("/", 1)[0]
PRIMARY, SECONDARY, EPTP = 0x4002, 0x401E, 0x201A
VMCS01, VMCS02 = 0x1000, 0x2000


class Fake:
    """Two VMCSs, memory of 64 KiB words, who runs."""

    def __init__(self):
        self.memory, self.fields, self.guest, self.current = {}, {}, 1, VMCS02
        self.seen, self.ept12, self.said = [VMCS01, VMCS02], 0, []
        # The state of who runs.
        self.live = {"cr0": 0x8000_0001, "cr3": 0x10000, "cr4": 1 << 5, "efer": 1 << 10}

    def put(self, at, value):
        self.memory[at] = value

    def monitor(self, command):
        self.said.append(command)
        words = command.split()
        if words[0] == "state":
            live = " ".join("%s=%#x" % pair for pair in self.live.items())
            seen = ",".join("%#x" % at for at in self.seen)
            return "guest=%d vmx=1 vmcs=%#x %s cs=0x0 ept12=%#x ticks=5 seen=%s" % (
                self.guest, self.current, live, self.ept12, seen)
        if words[0] == "field":
            value = self.fields.get((int(words[1], 16), int(words[2], 16)))
            return "?" if value is None else "%#x" % value
        if words[0] == "phys":
            at, count = int(words[1], 16), int(words[2], 16)
            out = bytearray()
            for n in range(count):
                word = self.memory.get((at + n) & ~7, 0)
                out.append(word >> 8 * ((at + n) & 7) & 0xFF)
            return out.hex()
        return "ok"


fake = Fake()


def load():
    gdb = types.ModuleType("gdb")

    class GdbError(Exception):
        pass

    class Command:
        def __init__(self, *_):
            pass

    class Breakpoint:
        def __init__(self, place):
            self.place = place

    gdb.GdbError, gdb.Command, gdb.Breakpoint = GdbError, Command, Breakpoint
    gdb.COMMAND_USER, gdb.COMPLETE_NONE = 0, 0
    gdb.parse_and_eval = lambda text: int(text, 0)
    gdb.string_to_argv = str.split

    def execute(command, to_string=False):
        return fake.monitor(command[len("monitor "):]) if command.startswith("monitor ") else ""

    gdb.execute = execute
    sys.modules["gdb"] = gdb
    sys.path.insert(0, HERE)
    sys.dont_write_bytecode = True
    import nvmx
    return nvmx, gdb


nvmx, gdb = load()


def with_ept(vmcs, pointer):
    fake.fields[vmcs, PRIMARY], fake.fields[vmcs, SECONDARY], fake.fields[vmcs, EPTP] = 1 << 31, 2, pointer


def chain(tables, at, leaf, place=lambda a: a):
    """Entries for `at` through these tables, the last to `leaf`."""
    for n, table in enumerate(tables):
        shift = 12 + 9 * (3 - n)
        last = n + 1 == len(tables)
        fake.put(place(table + (at >> shift & 511) * 8), (leaf if last else tables[n + 1]) | 7)


class Walks(unittest.TestCase):
    def setUp(self):
        fake.__init__()
        nvmx.machine.root = 1
        # L3's page tables lie at 0x10000... of its memory, which the EPT puts 1 MiB higher.
        with_ept(VMCS02, 0x50000 | 3 << 3 | 6)
        for page in range(0x10000, 0x18000, 0x1000):
            chain([0x50000, 0x51000, 0x52000, 0x53000], page, page + 0x10_0000)
        chain([0x10000, 0x11000, 0x12000, 0x13000], 0x7F_1234_5000, 0x14000, lambda a: a + 0x10_0000)

    def test_a_linear_address_of_l3_goes_by_its_tables_and_the_ept(self):
        space = nvmx.Space(3)
        physical = space.to_physical(0x7F_1234_5678)
        self.assertEqual((physical, space.to_host(physical)), (0x14678, 0x114678))
        fake.put(0x114678, 0x1122_3344_5566_7788)
        self.assertEqual(nvmx.Space(3).read(0x7F_1234_5678, 8), bytes.fromhex("8877665544332211"))
        with self.assertRaises(gdb.GdbError):
            nvmx.Space(3).read(0x1000, 1)

    def test_a_level_that_does_not_run_is_read_by_its_vmcs(self):
        for key, value in fake.live.items():
            fake.fields[VMCS02, nvmx.GUEST[key]] = value
        fake.live, fake.guest, fake.current = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}, 1, VMCS01
        self.assertEqual(nvmx.machine.running(nvmx.machine.state()), 2)
        self.assertEqual(nvmx.Space(3).to_physical(0x7F_1234_5678), 0x14678)
        with_ept(VMCS01, 0)
        fake.fields[VMCS01, SECONDARY] = 0
        # L2 has no paging here and no EPT: all is one to one.
        self.assertEqual(nvmx.Space(2).to_physical(0x1234), 0x1234)

    def test_large_pages_and_32_bit_tables(self):
        fake.fields[VMCS02, SECONDARY] = 0
        fake.put(0x12000 + 8 * (0x1234_5000 >> 21 & 511), 0xAAA0_0000 | 0x87)
        fake.put(0x10000, 0x11007)
        fake.put(0x11000, 0x12007)
        self.assertEqual(nvmx.Space(3).to_physical(0x1234_5678), 0xAAA0_0000 | 0x1234_5678 & 0x1F_FFFF)
        fake.live.update(cr4=0, efer=0)
        fake.memory.clear()
        fake.put(0x10000, 0x11007 << 32)
        fake.put(0x11008, 0x77003)
        self.assertEqual(nvmx.Space(3).to_physical(1 << 22 | 0x2_345), 0x77345)

    def test_ept12_and_ept01_agree_with_ept02(self):
        with_ept(VMCS01, 0x60000 | 3 << 3 | 6)
        for page in [0x70000, 0x71000, 0x72000, 0x73000, 0x114000]:
            chain([0x60000, 0x61000, 0x62000, 0x63000], page, page)
        chain([0x70000, 0x71000, 0x72000, 0x73000], 0x14000, 0x114000)
        fake.ept12 = 0x70000 | 3 << 3 | 6
        said = []
        nvmx.print = said.append
        nvmx.Walk("walk").run(["L3", "0x7f12345678"])
        del nvmx.print
        self.assertTrue(any("is physical 0x14678 of L3, 0x114678 of the machine" in line for line in said), said)
        self.assertTrue(said[-1].endswith("as ept02 has it"), said)

    def test_what_ept02_lacks_is_found_by_ept12_and_ept01(self):
        with_ept(VMCS01, 0x60000 | 3 << 3 | 6)
        for page in [0x70000, 0x71000, 0x72000, 0x73000, *range(0x110000, 0x118000, 0x1000)]:
            chain([0x60000, 0x61000, 0x62000, 0x63000], page, page)
        for page in range(0x10000, 0x18000, 0x1000):
            chain([0x70000, 0x71000, 0x72000, 0x73000], page, page + 0x10_0000)
        fake.ept12 = 0x70000 | 3 << 3 | 6
        with_ept(VMCS02, 0x80000 | 3 << 3 | 6)
        fake.put(0x114678, 7)
        self.assertEqual(nvmx.Space(3).read(0x7F_1234_5678, 1), b"\x07")
        said = []
        nvmx.print = said.append
        nvmx.Walk("walk").run(["L3", "0x7f12345678"])
        del nvmx.print
        self.assertTrue(said[-1].endswith("ept02 has nothing there yet"), said)

    def test_stops_and_levels(self):
        nvmx.print = lambda _: None
        nvmx.machine.__class__.running, was = lambda *_: 3, nvmx.Machine.running
        nvmx.number, number = (lambda _: 0), nvmx.number
        for level, command in [("L1", "exit 1"), ("L2", "entry 0 0"), ("L3", "entry 1 63")]:
            nvmx.Stop("stop").run([level])
            self.assertIn(command, fake.said)
        nvmx.machine.root = 2
        nvmx.Stop("stop").run(["L3"])
        self.assertIn("entry 0 63", fake.said)
        for bad in ["L1", "L4", "x"]:
            with self.assertRaises(gdb.GdbError):
                nvmx.level_named(bad)
        nvmx.Machine.running, nvmx.number = was, number
        del nvmx.print


unittest.main()
