//! How figures and words are written for people.

/// Thousands apart.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Thousands apart, one decimal where it says something.
pub fn number(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".into() };
    let tenths = (value.abs() * 10.0).round() as u64;
    let (whole, tenth) = if tenths >= 1000 { ((value.abs().round()) as u64, 0) } else { (tenths / 10, tenths % 10) };
    let mut text = grouped(whole);
    if tenth != 0 {
        text.push_str(&format!(".{tenth}"));
    }
    if value < 0.0 && text != "0" { format!("-{text}") } else { text }
}

/// Text in XML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_easily() {
        let texts = [0.0, 2.0, 0.96, 12.34, 99.97, 123.4, 1200.0, 1_234_567.8, -3.0, -0.001].map(|v| number(Some(v)));
        assert_eq!(texts, ["0", "2", "1", "12.3", "100", "123", "1,200", "1,234,568", "-3", "0"]);
        assert_eq!(number(None), "-");
    }
}
