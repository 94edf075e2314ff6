//! Command lines where the loader left them.

use arrayvec::ArrayString;

use crate::{
    addr::Hpa,
    boot::info::InfoError,
    mm::{PhysMem, Span},
};

/// A longer command line has no end.
const LONGEST_LINE: u64 = 1 << 20;
/// Bytes that are read at once; memory ends at a multiple of it.
const CHUNK: u64 = 64;

/// A command line where the loader left it, without the zero behind it. The default is an empty one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Text(Span);

/// A word of a command line. One that is longer ends in `…`, and is then no word that nvmx knows.
pub type Word = ArrayString<64>;

impl Text {
    /// The zero-terminated text at `at`; an empty one when that is 0.
    ///
    /// # Errors
    /// [`InfoError::Malformed`] if it has no end.
    pub(super) fn find(at: Hpa, memory: &impl PhysMem) -> Result<Self, InfoError> {
        let start = at.get();
        let mut end = start;
        while start != 0 && end - start <= LONGEST_LINE {
            let mut bytes = [0; CHUNK as usize];
            let chunk = end & !(CHUNK - 1);
            memory.read_bytes(Hpa::new(chunk), &mut bytes);
            if let Some(zero) = bytes.iter().skip((end - chunk) as usize).position(|byte| *byte == 0) {
                return Ok(Self(Span::sized(start, end - start + zero as u64)));
            }
            end = chunk.checked_add(CHUNK).ok_or(Self::ENDLESS)?;
        }
        if start == 0 { Ok(Self::default()) } else { Err(Self::ENDLESS) }
    }

    const ENDLESS: InfoError = InfoError::Malformed("a command line does not end within 1 MiB");

    /// Where it lies.
    pub const fn span(self) -> Span {
        self.0
    }

    /// Its words; a byte that is no ASCII is a `?`.
    pub fn words(self, memory: &impl PhysMem) -> impl Iterator<Item = Word> {
        let mut rest = self.bytes(0, memory);
        core::iter::from_fn(move || {
            let mut word = Word::new();
            let mut cut = false;
            for byte in rest.by_ref() {
                if byte.is_ascii_whitespace() {
                    if word.is_empty() {
                        continue;
                    }
                    break;
                }
                cut |= word.try_push(if byte.is_ascii() { byte.into() } else { '?' }).is_err();
            }
            if cut {
                word.truncate(word.len() - '…'.len_utf8());
                word.push('…');
            }
            (!word.is_empty()).then_some(word)
        })
    }

    /// What follows the first word.
    pub(super) fn without_file_name(self, memory: &impl PhysMem) -> Self {
        let blank = |byte: &u8| byte.is_ascii_whitespace();
        let mut rest = (self.0.start()..).zip(self.bytes(0, memory)).skip_while(|(_, byte)| blank(byte));
        let behind = rest.by_ref().find(|(_, byte)| blank(byte)).and_then(|_| rest.find(|(_, byte)| !blank(byte)));
        Self(Span::new(behind.map_or(self.0.end(), |(at, _)| at), self.0.end()))
    }

    /// What follows the word that the last slash is in: the file's name with its folders, which may have blanks.
    pub(super) fn without_path(self, memory: &impl PhysMem) -> Self {
        let slashes = (self.0.start()..).zip(self.bytes(0, memory)).filter(|(_, byte)| *byte == b'/');
        let name = slashes.last().map_or(self.0.start(), |(at, _)| at);
        Self(Span::new(name, self.0.end())).without_file_name(memory)
    }

    /// Its bytes from this one on.
    fn bytes(self, from: u64, memory: &impl PhysMem) -> impl Iterator<Item = u8> {
        (self.0.start() + from..self.0.end()).map(move |at| {
            let mut byte = [0];
            memory.read_bytes(Hpa::new(at), &mut byte);
            byte[0]
        })
    }
}
