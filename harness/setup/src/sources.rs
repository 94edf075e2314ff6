//! apt's source entries: from the machine's own entry to one for the source package of another release.

use anyhow::{Context, Result};
use std::path::Path;

/// One archive of the machine, from either of apt's two formats.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Where
    pub uri: String,
    /// Releases
    pub suites: Vec<String>,
    /// `main` and others
    pub components: Vec<String>,
    /// The value of Signed-By, several lines if a key is embedded
    pub signed_by: Option<String>,
}

/// Reads the deb822 format (`*.sources`).
pub fn parse_deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    // Comment lines do not end a paragraph, so they go first.
    let clean: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    for paragraph in clean.split(|l| l.trim().is_empty()) {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in paragraph {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line);
                }
            } else if let Some((key, value)) = line.split_once(':') {
                fields.push((key.trim().to_ascii_lowercase(), value.trim().to_string()));
            }
        }
        let get = |key: &str| fields.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        let words = |key: &str| -> Vec<String> {
            get(key).unwrap_or_default().split_whitespace().map(str::to_string).collect()
        };
        let off = get("enabled").is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "no" | "false" | "0"));
        if off || !words("types").iter().any(|t| t == "deb") {
            continue;
        }
        for uri in words("uris") {
            let (suites, components) = (words("suites"), words("components"));
            entries.push(Entry { uri, suites, components, signed_by: get("signed-by") });
        }
    }
    entries
}

/// Reads the one-line format (`*.list`).
pub fn parse_list(text: &str) -> Vec<Entry> {
    text.lines().filter_map(parse_list_line).collect()
}

fn parse_list_line(line: &str) -> Option<Entry> {
    let mut rest = line.split('#').next()?.trim().strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = None;
    if let Some(inside) = rest.strip_prefix('[') {
        let (options, after) = inside.split_once(']')?;
        signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by=")).map(str::to_string);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_string);
    Some(Entry { uri: words.next()?, suites: vec![words.next()?], components: words.collect(), signed_by })
}

/// All entries under `/etc/apt`.
pub fn of_machine(etc_apt: &Path) -> Vec<Entry> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let mut entries = parse_list(&read(&etc_apt.join("sources.list")));
    let folder = std::fs::read_dir(etc_apt.join("sources.list.d"));
    let mut files: Vec<_> = folder.into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.sort();
    for file in files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => entries.extend(parse_deb822(&read(&file))),
            Some("list") => entries.extend(parse_list(&read(&file))),
            _ => {}
        }
    }
    entries
}

/// The machine's main archive: the one with the release itself, not its updates or security suite.
pub fn main_archive<'a>(entries: &'a [Entry], codename: &str) -> Option<&'a Entry> {
    let has_main = |e: &&Entry| e.components.iter().any(|c| c == "main");
    let plain = |s: &String| !s.contains(['-', '/']);
    let mut candidates = entries.iter().filter(has_main);
    let exact = candidates.clone().find(|e| e.suites.iter().any(|s| s == codename));
    exact.or_else(|| candidates.find(|e| e.suites.iter().any(plain)))
}

/// A deb822 paragraph for the sources of another release in the same archive.
pub fn source_paragraph(archive: &Entry, suite: &str, component: &str) -> String {
    let mut text = format!("Types: deb-src\nURIs: {}\nSuites: {suite}\nComponents: {component}\n", archive.uri);
    if let Some(key) = &archive.signed_by {
        text.push_str(&format!("Signed-By: {key}\n"));
    }
    text
}

/// `ID` and `VERSION_CODENAME` of `/etc/os-release`.
///
/// # Errors
/// If the file cannot be read.
pub fn distribution() -> Result<(String, String)> {
    let text = std::fs::read_to_string("/etc/os-release").context("cannot tell which distribution this is")?;
    Ok((os_release(&text, "ID"), os_release(&text, "VERSION_CODENAME")))
}

/// A value of an os-release file, empty if absent.
pub fn os_release(text: &str, key: &str) -> String {
    let value = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
    value.unwrap_or_default().trim_matches(['"', '\'']).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb\n# a snapshot\nURIs: http://archive.example/debian\nSuites: bookworm bookworm-updates\n\
        Components: main\nSigned-By: /usr/share/keyrings/archive.gpg\n\nTypes: deb\nURIs: http://archive.example/security\n\
        Suites: bookworm-security\nComponents: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.example/\nSuites: bookworm\n\
        Components: main\n";

    #[test]
    fn the_source_entry_keeps_archive_and_key_of_a_deb822_file() {
        let entries = parse_deb822(DEB822);
        assert_eq!(entries.len(), 2);
        let archive = main_archive(&entries, "bookworm").unwrap();
        assert_eq!(
            source_paragraph(archive, "trixie", "main"),
            "Types: deb-src\nURIs: http://archive.example/debian\nSuites: trixie\nComponents: main\n\
             Signed-By: /usr/share/keyrings/archive.gpg\n"
        );
    }

    #[test]
    fn an_embedded_key_is_kept_as_it_is() {
        let text = "Types: deb deb-src\nURIs: http://a.example/d\nSuites: trixie\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let entries = parse_deb822(text);
        let paragraph = source_paragraph(&entries[0], "trixie", "main");
        assert!(paragraph.ends_with("Signed-By: \n -----BEGIN\n .\n abc\n"), "{paragraph}");
        assert_eq!(parse_deb822(&paragraph.replace("deb-src", "deb"))[0].signed_by, entries[0].signed_by);
    }

    #[test]
    fn the_one_line_format_is_read_with_and_without_options() {
        let text = "# comment\ndeb-src http://s.example/ x main\ndeb [arch=amd64 signed-by=/k.gpg] http://a.example/ubuntu noble main universe # why\n\
            deb http://b.example/debian bookworm main\ndeb\n";
        let entries = parse_list(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(entries[0].components, ["main", "universe"]);
        assert_eq!(main_archive(&entries, "bookworm").unwrap().uri, "http://b.example/debian");
    }

    #[test]
    fn without_the_codename_a_plain_suite_is_taken_and_never_the_security_one() {
        let text = "deb http://sec.example/ stable-security main\ndeb http://a.example/ stable main\n";
        assert_eq!(main_archive(&parse_list(text), "bookworm").unwrap().uri, "http://a.example/");
        assert_eq!(main_archive(&parse_list("deb http://x.example/ x/updates main"), "bookworm"), None);
    }

    #[test]
    fn os_release_values_may_be_quoted() {
        assert_eq!(os_release("ID=debian\nVERSION_CODENAME=\"trixie\"\n", "VERSION_CODENAME"), "trixie");
        assert_eq!(os_release("ID_LIKE=debian\n", "ID"), "");
    }
}
