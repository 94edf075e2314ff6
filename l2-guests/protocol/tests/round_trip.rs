//! Every record that can be written can be read back.

use l2_protocol::{Hex, Kind, Level, OwnedRecord, Record, is_record};
use proptest::prelude::*;

fn records() -> impl Strategy<Value = OwnedRecord> {
    let level = prop::sample::select(Level::ALL);
    let kind = prop::sample::select(Kind::ALL);
    let value = prop_oneof!["\\PC*", any::<String>(), "[\\x00-\\x7f]*", "[a-z0-9.]+"];
    let fields = prop::collection::btree_map("[a-z0-9_]{1,8}", value, 0..6);
    (level, kind, fields).prop_map(|(level, kind, fields)| OwnedRecord {
        level,
        kind,
        fields: fields.into_iter().collect(),
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(record in records()) {
        let line = record.to_string();
        prop_assert!(is_record(&line));
        prop_assert!(!line.chars().any(char::is_control), "{line:?}");
        prop_assert_eq!(OwnedRecord::parse(&line), Ok(record));
    }

    #[test]
    fn formatted_text_is_read_as_it_was(text in any::<String>(), number in any::<u64>()) {
        let mut line = String::new();
        Record::new(&mut line, Level::L3, Kind::Say)
            .field("text", format_args!("{text}"))
            .field("decimal", number)
            .field("hex", Hex(number))
            .end()
            .unwrap();
        let record = OwnedRecord::parse(&line).unwrap();
        prop_assert_eq!(record.get("text"), Some(text.as_str()));
        prop_assert_eq!(record.number("decimal"), Ok(number));
        prop_assert_eq!(record.number("hex"), Ok(number));
    }

    #[test]
    fn no_line_makes_the_parser_panic(line in any::<String>(), tail in "[ -~]*") {
        let _ = OwnedRecord::parse(&line);
        let _ = OwnedRecord::parse(&format!("@L2 event {tail}"));
    }
}

#[test]
fn a_key_that_is_none_fails_the_record() {
    for key in ["", "Name", "a b", "a=", "é"] {
        let mut line = String::new();
        assert!(Record::new(&mut line, Level::L2, Kind::Event).field(key, 1u32).end().is_err(), "{key}");
    }
}
