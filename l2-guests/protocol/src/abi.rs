//! The interface that nvmx offers to L2 by CPUID: identity, counters, and why VMX refused something.
//!
//! L2 reads a counter in two steps, so that reading does not disturb what is read: [`LEAF_COUNTERS`] with ECX =
//! [`SNAPSHOT`] copies all counters of this CPU, then [`LEAF_COUNTERS`] with ECX = index returns one of the copied values
//! (low half in EAX, high half in EDX, EBX = 1 if the index exists). The exits for these leaves are not counted.

/// First leaf: EAX = highest leaf, EBX, ECX, EDX = [`SIGNATURE`].
pub const LEAF_SIGNATURE: u32 = 0x4000_0000;
/// "nvmxnvmxnvmx"
pub const SIGNATURE: [u8; 12] = *b"nvmxnvmxnvmx";
/// EAX = interface version, EBX = number of counters below [`EXITS_OF_L2`], ECX = [`Strategy`] as a number, EDX = 1
/// if nvmx edits VMCSs in memory (else 0).
pub const LEAF_INTERFACE: u32 = 0x4000_0001;
/// The counters: see the module's text.
pub const LEAF_COUNTERS: u32 = 0x4000_0002;
/// What VMX refused last on this CPU and why; ECX chooses what is told. All of it stays until the next refusal.
pub const LEAF_REFUSAL: u32 = 0x4000_0003;
/// ECX of [`LEAF_REFUSAL`]: EAX = [`Refused`] as a number, EBX = VM-instruction error (0: VMfailInvalid) or basic exit
/// reason, ECX = low half of the exit qualification, EDX = refusals so far (modulo 2^32).
pub const REFUSAL_SUMMARY: u32 = 0;
/// ECX of [`LEAF_REFUSAL`]: the rule that was broken. EAX = its number plus 1 in this build of nvmx (0: not known), EBX =
/// number of fields that it is about, ECX = bytes of its name, EDX = bytes of its text. Names stay what they are, numbers do not.
pub const REFUSAL_RULE: u32 = 1;
/// ECX of [`LEAF_REFUSAL`], plus i: encodings of fields 4i to 4i + 3 in EAX, EBX, ECX, EDX; beyond the last [`NO_FIELD`].
pub const REFUSAL_FIELDS: u32 = 0x100;
/// ECX of [`LEAF_REFUSAL`], plus i: bytes 16i to 16i + 15 of the rule's name (ASCII) in EAX, EBX, ECX, EDX; beyond the end 0.
pub const REFUSAL_NAME: u32 = 0x200;
/// ... of its text: what must hold, or for an instruction error what was wrong.
pub const REFUSAL_TEXT: u32 = 0x300;
/// No encoding of a VMCS field.
pub const NO_FIELD: u32 = 0xFFFF_FFFF;
/// EAX = number of CPUs that L2 has, EBX = number of this one, counted from 0 (the one that booted).
pub const LEAF_CPUS: u32 = 0x4000_0004;
/// Added to a leaf, times k: the same leaf of the k-th nvmx below this one (zeros if there is none), so that a guest on a
/// stack of nvmx can read the counters of each. The exits for the way there are not taken out of the counts in between.
pub const BELOW: u32 = 0x100;
/// Highest leaf.
pub const LEAF_MAX: u32 = LEAF_CPUS;
/// The version this module describes.
pub const INTERFACE_VERSION: u32 = 4;
/// ECX of [`LEAF_COUNTERS`] that takes the snapshot.
pub const SNAPSHOT: u32 = 0xFFFF_FFFF;
/// Added to an index of [`LEAF_COUNTERS`]: the sum over all CPUs, each as it was at that CPU's last snapshot.
pub const OF_ALL_CPUS: u32 = 1 << 31;
/// Index of the exits of L2 by basic exit reason: `EXITS_OF_L2 + reason`.
pub const EXITS_OF_L2: u32 = 0x100;
/// Index of the exits of L3 by basic exit reason: `EXITS_OF_L3 + reason`.
pub const EXITS_OF_L3: u32 = 0x200;
/// Index of the number of nvmx's frames that are free now; not part of the snapshot.
pub const FRAMES_FREE: u32 = 0x300;
/// Index of the most bytes of nvmx's stack on this CPU that were in use since L2 runs; not part of the snapshot.
pub const STACK_USED: u32 = 0x301;
/// Basic exit reasons counted one by one; higher ones are counted in the last.
pub const REASONS: usize = 80;

/// First word of the block of last exits that each CPU of nvmx keeps in its memory, for whoever looks at a machine that hangs
/// from outside. Four words: this mark, the block's own linear address, then for L2 and for L3 the exit-reason field
/// ([`NO_LAST_EXIT`]: no exit yet).
pub const LAST_EXITS_MARK: u64 = u64::from_le_bytes(*b"nvmxlast");
/// In that block: there was no exit yet. No exit reason has all bits.
pub const NO_LAST_EXIT: u32 = u32::MAX;
/// Words of that block.
pub const LAST_EXITS_WORDS: usize = 4;

macro_rules! counters {
    ($( $(#[$doc:meta])* $variant:ident = $name:literal; )*) => {
        /// A counter of one CPU; the discriminant is its index.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Counter { $( $(#[$doc])* $variant, )* }

        impl Counter {
            /// All of them, in order of index.
            pub const ALL: &'static [Counter] = &[ $( Counter::$variant, )* ];
            /// The key in records and reports.
            pub const fn name(self) -> &'static str {
                match self { $( Counter::$variant => $name, )* }
            }
        }
    };
}

counters! {
    /// Hardware VM exits taken by nvmx, all levels
    HwExits = "hw_exits";
    /// ... of L2
    ExitsL2 = "exits_l2";
    /// ... of L3
    ExitsL3 = "exits_l3";
    /// Exits of L3 that L2 got to see
    Reflected = "reflected";
    /// TSC ticks from the first instruction after an exit to the last before the next entry
    L1Ticks = "l1_ticks";
    /// VMREAD executed by nvmx
    Vmread = "l1_vmread";
    /// VMWRITE executed by nvmx
    Vmwrite = "l1_vmwrite";
    /// VMPTRLD executed by nvmx
    Vmptrld = "l1_vmptrld";
    /// VMCLEAR executed by nvmx
    Vmclear = "l1_vmclear";
    /// INVEPT executed by nvmx
    Invept = "l1_invept";
    /// INVVPID executed by nvmx
    Invvpid = "l1_invvpid";
    /// VMREAD of L2 that exited
    TrappedVmread = "trapped_vmread";
    /// VMWRITE of L2 that exited
    TrappedVmwrite = "trapped_vmwrite";
    /// Entries of ept02 filled
    Ept02Fills = "ept02_fills";
    /// ept02 contexts that an INVEPT of L2 concerned
    Ept02Flushes = "ept02_flushes";
    /// ept02 contexts dropped for want of tables or of roots
    Ept02Evictions = "ept02_evictions";
}

/// What was refused, for [`LEAF_REFUSAL`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Refused {
    /// Nothing yet.
    Nothing = 0,
    /// A VMX instruction, for another reason than the checks of a VM entry.
    Instruction = 1,
    /// A VM entry by the checks on control fields: VM-instruction error 7.
    Controls = 2,
    /// A VM entry by the checks on the host-state area: VM-instruction error 8.
    HostState = 3,
    /// A VM entry by the checks on the guest-state area: exit reason 33.
    GuestState = 4,
    /// A VM entry by an entry of its MSR-load area, whose number is the qualification: exit reason 34.
    MsrLoading = 5,
}

/// How L2's VMREAD and VMWRITE reach vmcs12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Strategy {
    /// No VMCS shadowing: every access exits.
    Trapped = 0,
    /// VMCS shadowing with vmcs02 as the shadow VMCS: the guest's fields are never copied.
    ZeroCopy = 1,
}

impl Strategy {
    /// The name in logs, reports and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Strategy::Trapped => "trapped",
            Strategy::ZeroCopy => "zero-copy",
        }
    }
}
