//! Writing a record, without an allocator.

use core::fmt::{self, Write};

/// The first character of a record's line.
pub const MARK: char = '@';

macro_rules! words {
    ($(#[$doc:meta])* $type:ident { $( $(#[$vdoc:meta])* $variant:ident = $word:literal, )* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $type { $( $(#[$vdoc])* $variant, )* }

        impl $type {
            /// All of them.
            pub const ALL: &'static [$type] = &[ $( $type::$variant, )* ];

            /// The word on the line.
            pub const fn word(self) -> &'static str {
                match self { $( $type::$variant => $word, )* }
            }

            /// The reverse of [`Self::word`].
            pub fn from_word(word: &str) -> Option<$type> {
                match word { $( $word => Some($type::$variant), )* _ => None }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

words! {
    /// Who speaks.
    Level {
        /// nvmx
        L1 = "L1",
        /// The guest hypervisor
        L2 = "L2",
        /// Its guest
        L3 = "L3",
    }
}

words! {
    /// What is said.
    Kind {
        /// The first record of a level: name, version, features
        Hello = "hello",
        /// A line for a person
        Say = "say",
        /// Totals of a bracket of events
        Event = "event",
        /// A fact that must be the same bare and under nvmx
        Check = "check",
        /// Why nvmx refused something: the same under every nvmx
        Explained = "explained",
        /// What VMX refused, where in L2, and a rule that was broken, as it happens
        Refused = "refused",
        /// The capability MSRs that the guest goes by ([`crate::caps`])
        Caps = "caps",
        /// An exit of nvmx's own trace ([`crate::trace`])
        Trace = "trace",
        /// The last record of a guest: status and number of failures
        End = "end",
        /// How a machine died
        Epitaph = "epitaph",
    }
}

/// A number that is written as `0x..`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hex(pub u64);

/// What can stand right of a `=`.
pub trait Value {
    /// Writes the value as a bare word or quoted.
    fn write_to(&self, out: &mut dyn Write) -> fmt::Result;
}

macro_rules! bare_values {
    ($($type:ty)*) => { $(
        impl Value for $type {
            fn write_to(&self, out: &mut dyn Write) -> fmt::Result {
                write!(out, "{self}")
            }
        }
    )* };
}

bare_values!(u8 u16 u32 u64 usize i32 i64 bool);

impl Value for Hex {
    fn write_to(&self, out: &mut dyn Write) -> fmt::Result {
        write!(out, "{:#x}", self.0)
    }
}

/// Bare if it can be, else quoted.
impl Value for str {
    fn write_to(&self, out: &mut dyn Write) -> fmt::Result {
        if !self.is_empty() && self.chars().all(is_bare) {
            out.write_str(self)
        } else {
            write!(Quoted::open(out)?, "{self}")?;
            out.write_char('"')
        }
    }
}

/// Always quoted, since its length is not known before.
impl Value for fmt::Arguments<'_> {
    fn write_to(&self, out: &mut dyn Write) -> fmt::Result {
        Quoted::open(out)?.write_fmt(*self)?;
        out.write_char('"')
    }
}

impl<T: Value + ?Sized> Value for &T {
    fn write_to(&self, out: &mut dyn Write) -> fmt::Result {
        (**self).write_to(out)
    }
}

/// Characters of a word that needs no quotes.
pub(crate) fn is_bare(c: char) -> bool {
    c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '=')
}

/// Characters of a key.
pub(crate) fn is_key(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'
}

/// Escapes what would end a value or a line.
struct Quoted<'a>(&'a mut dyn Write);

impl<'a> Quoted<'a> {
    fn open(out: &'a mut dyn Write) -> Result<Self, fmt::Error> {
        out.write_char('"')?;
        Ok(Self(out))
    }
}

impl Write for Quoted<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for c in s.chars() {
            match c {
                '"' => self.0.write_str("\\\"")?,
                '\\' => self.0.write_str("\\\\")?,
                '\n' => self.0.write_str("\\n")?,
                c if c.is_control() => write!(self.0, "\\u{:04x}", u32::from(c))?,
                c => self.0.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// A record in the making: each call writes at once, [`Record::end`] ends the line and says whether all went well.
///
/// ```
/// # use l2_protocol::{Hex, Kind, Level, Record};
/// let mut line = String::new();
/// Record::new(&mut line, Level::L2, Kind::Check).field("name", "vmxon twice").field("error", 15).field("at", Hex(16)).end()?;
/// assert_eq!(line, "@L2 check name=\"vmxon twice\" error=15 at=0x10\n");
/// # Ok::<(), std::fmt::Error>(())
/// ```
#[must_use = "a record needs its `end`"]
pub struct Record<'a> {
    out: &'a mut dyn Write,
    status: fmt::Result,
}

impl<'a> Record<'a> {
    /// Begins a line.
    pub fn new(out: &'a mut dyn Write, level: Level, kind: Kind) -> Self {
        let status = write!(out, "{MARK}{level} {kind}");
        Self { out, status }
    }

    /// Adds ` key=value`. A key consists of lower-case letters, digits and `_`; another one makes the record fail.
    pub fn field(mut self, key: &str, value: impl Value) -> Self {
        self.add(key, &value);
        self
    }

    /// [`Record::field`] for a loop over fields.
    pub fn add(&mut self, key: &str, value: &dyn Value) {
        if self.status.is_ok() {
            self.status = self.write(key, value);
        }
    }

    fn write(&mut self, key: &str, value: &dyn Value) -> fmt::Result {
        if key.is_empty() || !key.chars().all(is_key) {
            return Err(fmt::Error);
        }
        write!(self.out, " {key}=")?;
        value.write_to(self.out)
    }

    /// Ends the line.
    ///
    /// # Errors
    /// If the writer failed, or a key was not one.
    pub fn end(self) -> fmt::Result {
        let end = self.out.write_char('\n');
        self.status.and(end)
    }
}
