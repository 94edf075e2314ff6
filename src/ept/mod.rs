//! EPT tables: entries, the walker, ept01, ept02.
