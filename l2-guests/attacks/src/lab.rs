//! One attack after the other: each is announced, tried with several seeds, judged, and followed by a check that the
//! hypervisor below still does its work.

use crate::{
    guest::{self, Exit, Extra, Guest, Program, forget},
    place::{self, Place},
    random::Random,
};
use core::fmt::{self, Write};
use l2_kit::{
    Check,
    arrayvec::ArrayString,
    cpu, fields as f,
    identity::{self, Slot},
    log,
    pages::{self, PAGE},
    protocol::abi::Counter,
    report,
    serial::Serial,
    setup::{self, Missing},
    trap,
    vmx::{self, Outcome},
};

/// Where the guest's page tables map a page under attack, and where that is in its physical memory.
pub const LINEAR: u64 = 6 << 30;
/// The guest's physical address of that page.
pub const PHYSICAL: u64 = 20 << 30;

/// How the outcome of an attack enters its record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It must be the same on every machine.
    Same,
    /// It depends on whether there is memory, or on what the processor caches: that it was answered is what counts.
    Answered,
}

/// What came of one try.
#[derive(Clone, Debug)]
pub struct Seen {
    text: ArrayString<48>,
    escape: bool,
}

impl Seen {
    /// An outcome.
    pub fn of(what: impl fmt::Display) -> Self {
        let mut text = ArrayString::new();
        let _ = write!(text, "{what}");
        Self { text, escape: false }
    }

    /// Marks that something got out that should not, on a machine with a hypervisor below.
    pub fn escaped_if(mut self, escape: bool) -> Self {
        self.escape |= escape;
        self
    }
}

impl From<Exit> for Seen {
    fn from(exit: Exit) -> Self {
        Seen::of(exit)
    }
}

impl From<Outcome> for Seen {
    fn from(outcome: Outcome) -> Self {
        Seen::of(outcome)
    }
}

/// What the command line asks for.
#[derive(Clone, Copy, Default)]
pub struct Choice {
    pub seed: u64,
    pub rounds: u64,
    pub changes: u64,
    pub exits: u64,
    pub only: Option<&'static str>,
    pub list: bool,
}

/// What is tried, with what, and what was found.
pub struct Lab {
    /// The guest that attacks are tried with
    pub guest: Guest,
    /// Draws what an attack leaves open
    pub random: Random,
    /// Zeroed pages for structures; each attack gets them zeroed again
    pub pages: [u64; SPARE],
    probe: Guest,
    choice: Choice,
    region: u64,
    /// This try puts something beside the range that may change there.
    pub beside: bool,
    /// This try has nvmx compare very many tables at once.
    pub many_tables: bool,
    attacks: u64,
    tries: u64,
    name: ArrayString<96>,
    bracket: Option<(u64, u64)>,
    longest: Longest,
}

const SPARE: usize = 16;
/// What nvmx may take for a piece of a try and for each of its exits, in ticks, which are instructions on a Bochs with one CPU;
/// and for the entry after an INVEPT that compares as many tables of ept02 as there can be.
const MOST_TICKS: u64 = 250_000;
const EACH_TICKS: u64 = 8_000;
const ALL_TABLES_TICKS: u64 = 6_000_000;
/// A piece with at most this many exits shows what a single one takes.
const FEW: u64 = 8;

/// The piece of a try in which an exit can have taken longest: its ticks and its exits.
#[derive(Clone, Default)]
struct Longest {
    name: ArrayString<96>,
    ticks: u64,
    exits: u64,
}

impl Lab {
    /// A lab in VMX operation with the VMXON region at `region`.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(region: u64, choice: Choice) -> Result<Self, Missing> {
        let (guest, probe) = (Guest::new(1)?, Guest::new(2)?);
        guest.map_linear(LINEAR, PHYSICAL);
        let pages = [(); SPARE].map(|()| pages::address(pages::page()));
        let random = Random::new(0, "", 0);
        let mut lab = Self {
            guest,
            random,
            pages,
            probe,
            choice,
            region,
            beside: false,
            many_tables: false,
            attacks: 0,
            tries: 0,
            name: ArrayString::new(),
            bracket: None,
            longest: Longest::default(),
        };
        lab.probe.fresh(Extra::default())?;
        Ok(lab)
    }

    /// Names an attack that a part runs by itself; true if that is all that is wanted.
    pub fn lists(&mut self, name: fmt::Arguments<'_>) -> bool {
        self.attacks += 1;
        if self.choice.list {
            log!("{name}");
        }
        self.choice.list
    }

    /// Changes of tables that each variant of `roles` makes.
    pub fn changes(&self) -> u64 {
        self.choice.changes
    }

    /// Exits that `soak` makes, and a hundredth as many switches of guests.
    pub fn exits(&self) -> u64 {
        self.choice.exits
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.choice.seed
    }

    /// Address of the VMXON region.
    pub fn vmxon_region(&self) -> u64 {
        self.region
    }

    /// The guest with these controls, or the attack ends here.
    pub fn with(&mut self, extra: Extra) -> &mut Guest {
        if let Err(missing) = self.guest.fresh(extra) {
            report::die(format_args!("{missing}"));
        }
        self.bracket();
        &mut self.guest
    }

    /// Enters the guest.
    pub fn run(&mut self) -> Exit {
        self.bracket();
        let exit = self.guest.run();
        self.bracket();
        exit
    }

    /// Lets the guest begin a program and enters it.
    pub fn execute(&mut self, program: Program, argument: u64) -> Exit {
        self.guest.start(program, argument);
        self.run()
    }

    /// Maps the page under attack to `physical` with these bits of an EPT entry.
    pub fn lead_to(&mut self, physical: u64, bits: u64) {
        self.guest.ept.set(PHYSICAL, PAGE, physical | bits);
        forget();
    }

    /// Words of a spare page.
    pub fn words(&mut self, page: usize) -> &'static mut pages::Page {
        // SAFETY: the page is the lab's, and what `words` gave before is not used any more.
        unsafe { pages::at(self.pages[page]) }
    }

    /// One attack: announced, tried in all rounds, judged, recorded.
    pub fn attack<S: Into<Seen>>(
        &mut self,
        name: fmt::Arguments<'_>,
        told: Told,
        mut attempt: impl FnMut(&mut Self) -> S,
    ) {
        let mut text = ArrayString::<96>::new();
        let _ = text.write_fmt(name);
        self.attacks += 1;
        if self.choice.list {
            log!("{text}");
            return;
        }
        let mut key = ArrayString::<96>::new();
        text.chars().for_each(|c| key.push(if c == ' ' { '_' } else { c }));
        if self.choice.only.is_some_and(|only| !key.contains(only)) {
            return;
        }
        log!("now: {text}");
        self.name = text;
        let (mut escapes, mut ill, mut last, mut digest) = (0, 0, Seen::of(""), 0xCBF2_9CE4_8422_2325);
        for round in 0..self.choice.rounds {
            self.random = Random::new(self.choice.seed, &text, round);
            self.prepare();
            self.bracket = None;
            self.bracket();
            let seen: Seen = match trap::catch(|| attempt(self).into()) {
                Ok(seen) => seen,
                Err(trap) => Seen::of(format_args!("trap-{}({:#x})", trap.vector, trap.error)),
            };
            self.bracket();
            self.tries += 1;
            escapes += u64::from(seen.escape);
            if let Err(why) = self.healthy() {
                ill += 1;
                report::fail(format_args!("{text}, round {round}: afterwards {why}"));
            }
            digest = seen.text.bytes().fold(digest, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
            last = seen;
        }
        log!("  {}", last.text);
        let mut out = Serial;
        let check = Check::new(&mut out, text.as_str()).fact("cases", self.choice.rounds);
        let check = match told {
            Told::Same => check.fact("last", last.text.as_str()).fact("all", digest & 0xFFFF_FFFF),
            Told::Answered => check.fact("answered", true),
        };
        check.expect("escapes", escapes, 0).expect("ill", ill, 0).end();
    }

    /// The machine as each try finds it.
    fn prepare(&mut self) {
        for page in self.pages {
            // SAFETY: ours.
            unsafe { pages::at(page) }.fill(0);
        }
        // SAFETY: ours.
        unsafe { pages::at(self.guest.msr_bitmap) }.fill(0);
        for place in Place::BESIDE {
            place::fill(place.page(0));
        }
        self.lead_to(self.pages[0], l2_kit::ept::WRITE_BACK | 7);
        self.beside = false;
        self.many_tables = false;
        self.with(Extra::default());
    }

    /// Whether VMX still works: an entry, an exit, memory, the instructions on a VMCS, and what the attack must not reach.
    fn healthy(&mut self) -> Result<(), &'static str> {
        let fail = |outcome: Outcome, why| if outcome.succeeded() { Ok(()) } else { Err(why) };
        fail(vmx::vmptrld(self.probe.vcpu.vmcs), "VMPTRLD fails")?;
        if vmx::vmptrst() != (Outcome::Succeed, self.probe.vcpu.vmcs) {
            return Err("VMPTRST stores another pointer");
        }
        fail(vmx::invept(2, [0, 0]), "INVEPT fails")?;
        fail(vmx::invvpid(2, [0, 0]), "INVVPID fails")?;
        let value = self.random.next();
        fail(vmx::try_write(f::GUEST_FS_BASE.into(), value & 0x7FFF_FFFF_FFFF), "VMWRITE fails")?;
        if vmx::read(f::GUEST_FS_BASE) != value & 0x7FFF_FFFF_FFFF {
            return Err("VMREAD reads something else than was written");
        }
        self.words(15)[0] = value;
        if self.probe.execute(guest::read, self.pages[15]) != Exit::Done(value) {
            return Err("a guest does not read its memory");
        }
        self.probe.start(cpuid, value);
        if self.probe.run() != Exit::Reason(vmx::reason::CPUID) {
            return Err("a CPUID of a guest does not exit");
        }
        self.probe.skip();
        self.probe.vcpu.registers.rbx = 0x1234;
        if self.probe.run() != Exit::Done(value ^ 0x1234) {
            return Err("a guest that was entered again has lost its registers");
        }
        if setup::revision() & 0x7FFF_FFFF != cpu::rdmsr(setup::VMX_BASIC) as u32 & 0x7FFF_FFFF {
            return Err("the VMCS revision is another one");
        }
        if Place::BESIDE.iter().any(|place| place::damaged(place.page(0)) > self.may_damage()) {
            return Err("a page beside the range has changed");
        }
        Ok(())
    }

    /// Words that structures beside the range are allowed to take: attacks that put some there say so by their name.
    fn may_damage(&self) -> u64 {
        if self.beside { PAGE / 8 } else { 0 }
    }

    /// Ends a piece of a try whose time in nvmx is looked at by itself, and begins the next.
    pub fn bracket(&mut self) {
        let now = counted();
        if let (Some((ticks0, exits0)), Some((ticks1, exits1))) = (self.bracket, now) {
            let (ticks, exits) = (ticks1 - ticks0, exits1 - exits0);
            let most = if self.many_tables { ALL_TABLES_TICKS } else { MOST_TICKS };
            if crate::cpus() == 1 && ticks > most + exits * EACH_TICKS {
                report::fail(format_args!("{}: nvmx took {ticks} ticks for {exits} exits", self.name));
            }
            if ticks > self.longest.ticks && exits <= FEW {
                self.longest = Longest { name: self.name, ticks, exits };
            }
        }
        self.bracket = now;
    }

    /// Says how much was tried, and judges the time that it took.
    pub fn end(&mut self, part: &str) {
        let longest = core::mem::take(&mut self.longest);
        if Slot::find() == Slot::Nvmx && !self.choice.list {
            let (frames, stack) = identity::frames_and_stack();
            log!(
                "{part}: the longest piece took nvmx {} ticks in {} exits: {}; frames free {frames}, stack used {stack}",
                longest.ticks,
                longest.exits,
                longest.name
            );
        }
        let (attacks, tries) = (core::mem::take(&mut self.attacks), core::mem::take(&mut self.tries));
        Check::new(&mut Serial, format_args!("part {part}")).fact("attacks", attacks).fact("cases", tries).end();
    }
}

/// Leaves by CPUID and mixes what came in RBX into its argument: a program.
extern "C" fn cpuid(argument: u64) -> u64 {
    argument ^ u64::from(cpu::cpuid(0, 0)[1])
}

/// Ticks in nvmx and its exits so far, under nvmx.
fn counted() -> Option<(u64, u64)> {
    (Slot::find() == Slot::Nvmx).then(|| {
        let counters = identity::counters();
        (counters[Counter::L1Ticks as usize], counters[Counter::HwExits as usize])
    })
}
