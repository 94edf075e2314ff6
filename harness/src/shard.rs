//! The share of one machine among several.

use std::str::FromStr;

/// One of several shares that together are everything: `2/4`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shard {
    /// Which, from 1
    pub number: usize,
    /// Of how many
    pub of: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "K/N is expected, with K from 1 to N".to_string();
        let (number, of) = text.split_once('/').ok_or_else(bad)?;
        let shard = Shard { number: number.parse().map_err(|_| bad())?, of: of.parse().map_err(|_| bad())? };
        if (1..=shard.of).contains(&shard.number) { Ok(shard) } else { Err(bad()) }
    }
}

impl Shard {
    /// The share of a list that is the same on every machine.
    pub fn of<T>(self, list: Vec<T>) -> Vec<T> {
        let mine = |i: usize| i % self.of == self.number - 1;
        list.into_iter().enumerate().filter(|(i, _)| mine(*i)).map(|(_, item)| item).collect()
    }

    /// The share of so many: where it begins and how many it has.
    pub fn range(self, count: u64) -> (u64, u64) {
        let at = |n: usize| (u128::from(count) * n as u128 / self.of as u128) as u64;
        (at(self.number - 1), at(self.number) - at(self.number - 1))
    }
}
