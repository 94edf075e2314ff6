//! Reading a record back.

use crate::record::{Kind, Level, MARK, Record, is_bare, is_key};
use std::fmt;

/// Whether a line claims to be a record. A line that does and does not parse is a mistake of its writer.
pub fn is_record(line: &str) -> bool {
    line.starts_with(MARK)
}

/// A record with its fields in the order of the line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnedRecord {
    /// Who spoke
    pub level: Level,
    /// What it is
    pub kind: Kind,
    /// Keys (unique) and values, without quotes and escapes
    pub fields: Vec<(String, String)>,
}

/// Why a line is no record, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseError {
    /// Byte offset in the line
    pub offset: usize,
    /// What is wrong there
    pub problem: Problem,
}

/// What is wrong with a line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Problem {
    /// The line does not start with `@`
    NoMark,
    /// No such level
    UnknownLevel(String),
    /// No such kind of record
    UnknownKind(String),
    /// A key is expected: lower-case letters, digits, `_`
    BadKey,
    /// A key without `=`
    NoEquals(String),
    /// The key was there before
    DuplicateKey(String),
    /// A character that a bare value must not have
    BadCharacter(char),
    /// Nothing after `=`
    EmptyValue,
    /// The line ends inside quotes
    Unterminated,
    /// A `\` before something else than `"`, `\`, `n`, `uXXXX`
    BadEscape,
    /// A space is expected between fields
    NoSpace,
    /// [`OwnedRecord::number`]: the record has no such key
    MissingKey(String),
    /// [`OwnedRecord::number`]: the value is not a number
    NotANumber(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::NoMark => write!(f, "a record starts with `{MARK}`"),
            Problem::UnknownLevel(word) => write!(f, "`{word}` is no level"),
            Problem::UnknownKind(word) => write!(f, "`{word}` is no kind of record"),
            Problem::BadKey => write!(f, "a key is expected: lower-case letters, digits, `_`"),
            Problem::NoEquals(key) => write!(f, "`{key}` needs `=` and a value"),
            Problem::DuplicateKey(key) => write!(f, "`{key}` is there twice"),
            Problem::BadCharacter(c) => write!(f, "{c:?} must stand in quotes"),
            Problem::EmptyValue => write!(f, "an empty value is written as \"\""),
            Problem::Unterminated => write!(f, "the closing quote is missing"),
            Problem::BadEscape => write!(f, "unknown escape"),
            Problem::NoSpace => write!(f, "a space is expected after a value"),
            Problem::MissingKey(key) => write!(f, "the record has no `{key}`"),
            Problem::NotANumber(value) => write!(f, "`{value}` is not a number"),
        }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column {}: {}", self.offset.saturating_add(1), self.problem)
    }
}

impl std::error::Error for ParseError {}

impl OwnedRecord {
    /// Reads one line; a line end is ignored.
    ///
    /// # Errors
    /// The first thing that is wrong with the line.
    pub fn parse(line: &str) -> Result<Self, ParseError> {
        let mut cursor = Cursor { line: line.trim_end_matches(['\r', '\n']), at: 0 };
        if !cursor.eat(MARK) {
            return Err(cursor.error(Problem::NoMark));
        }
        let word = cursor.take(|c| c != ' ');
        let level =
            Level::from_word(word).ok_or(ParseError { offset: 1, problem: Problem::UnknownLevel(word.into()) })?;
        cursor.eat(' ');
        let start = cursor.at;
        let word = cursor.take(|c| c != ' ');
        let kind =
            Kind::from_word(word).ok_or(ParseError { offset: start, problem: Problem::UnknownKind(word.into()) })?;
        let mut fields: Vec<(String, String)> = Vec::new();
        while !cursor.rest().is_empty() {
            if !cursor.eat(' ') {
                return Err(cursor.error(Problem::NoSpace));
            }
            let start = cursor.at;
            let key = cursor.take(is_key);
            if key.is_empty() {
                return Err(cursor.error(Problem::BadKey));
            }
            if !cursor.eat('=') {
                return Err(cursor.error(Problem::NoEquals(key.into())));
            }
            if fields.iter().any(|(k, _)| k == key) {
                return Err(ParseError { offset: start, problem: Problem::DuplicateKey(key.into()) });
            }
            let value = if cursor.eat('"') { cursor.quoted()? } else { cursor.bare()? };
            fields.push((key.into(), value));
        }
        Ok(Self { level, kind, fields })
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.fields.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The value of a key as a decimal or `0x` number.
    ///
    /// # Errors
    /// If the key is missing or its value is not a number (the offset is 0 then).
    pub fn number(&self, key: &str) -> Result<u64, ParseError> {
        let fail = |problem| ParseError { offset: 0, problem };
        let value = self.get(key).ok_or_else(|| fail(Problem::MissingKey(key.into())))?;
        let parsed = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        };
        parsed.map_err(|_| fail(Problem::NotANumber(value.into())))
    }
}

/// The line that [`OwnedRecord::parse`] would read, without line end.
impl fmt::Display for OwnedRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = String::new();
        let mut record = Record::new(&mut line, self.level, self.kind);
        for (key, value) in &self.fields {
            record.add(key, &value.as_str());
        }
        record.end()?;
        f.write_str(line.trim_end_matches('\n'))
    }
}

struct Cursor<'a> {
    line: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        self.line.get(self.at..).unwrap_or_default()
    }

    fn error(&self, problem: Problem) -> ParseError {
        ParseError { offset: self.at, problem }
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.rest().starts_with(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn bare(&mut self) -> Result<String, ParseError> {
        let word = self.take(is_bare);
        match self.rest().chars().next() {
            Some(c) if c != ' ' => Err(self.error(Problem::BadCharacter(c))),
            _ if word.is_empty() => Err(self.error(Problem::EmptyValue)),
            _ => Ok(word.into()),
        }
    }

    fn quoted(&mut self) -> Result<String, ParseError> {
        let mut value = String::new();
        loop {
            match self.next() {
                None => return Err(self.error(Problem::Unterminated)),
                Some('"') => return Ok(value),
                Some('\\') => value.push(self.escape()?),
                Some(c) => value.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char, ParseError> {
        match self.next() {
            Some('n') => Ok('\n'),
            Some(c @ ('"' | '\\')) => Ok(c),
            Some('u') => {
                let digits = self.rest().get(..4).unwrap_or_default();
                let code =
                    u32::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(|b| b.is_ascii_hexdigit()));
                let c = code.and_then(char::from_u32).ok_or_else(|| self.error(Problem::BadEscape))?;
                self.at += 4;
                Ok(c)
            }
            _ => Err(self.error(Problem::BadEscape)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_line_gives_its_fields_in_order() {
        let record =
            OwnedRecord::parse("@L2 event name=cpuid count=1000 at=0x10 text=\"a \\\"b\\\" \\\\ \\n\"\r\n").unwrap();
        assert_eq!((record.level, record.kind), (Level::L2, Kind::Event));
        assert_eq!(record.fields[0], ("name".into(), "cpuid".into()));
        assert_eq!(record.number("count"), Ok(1000));
        assert_eq!(record.number("at"), Ok(16));
        assert_eq!(record.get("text"), Some("a \"b\" \\ \n"));
        assert_eq!(record.get("absent"), None);
    }

    #[test]
    fn each_mistake_is_named_with_its_column() {
        let cases = [
            ("hello", 1, "a record starts with `@`"),
            ("@L9 event", 2, "`L9` is no level"),
            ("@L2 evnt a=1", 5, "`evnt` is no kind of record"),
            ("@L2", 4, "`` is no kind of record"),
            ("@L2 event Name=x", 11, "a key is expected: lower-case letters, digits, `_`"),
            ("@L2 event name", 15, "`name` needs `=` and a value"),
            ("@L2 event a=1 a=2", 15, "`a` is there twice"),
            ("@L2 event a= b=2", 13, "an empty value is written as \"\""),
            ("@L2 event a=x=y", 14, "'=' must stand in quotes"),
            ("@L2 event a=\"x", 15, "the closing quote is missing"),
            ("@L2 event a=\"x\\t\"", 17, "unknown escape"),
            ("@L2 event a=\"x\\u12é\"", 17, "unknown escape"),
            ("@L2 event a=\"x\"b=1", 16, "a space is expected after a value"),
        ];
        for (line, column, text) in cases {
            let error = OwnedRecord::parse(line).unwrap_err();
            assert_eq!(error.to_string(), format!("column {column}: {text}"), "{line}");
        }
    }

    #[test]
    fn a_number_that_is_none_is_an_error() {
        let record = OwnedRecord::parse("@L2 event a=x").unwrap();
        assert_eq!(record.number("a").unwrap_err().problem, Problem::NotANumber("x".into()));
        assert_eq!(record.number("b").unwrap_err().problem, Problem::MissingKey("b".into()));
    }
}
