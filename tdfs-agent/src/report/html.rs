//! The page: one file that needs nothing else, neither a network nor a server.
//!
//! The data is JSON in a block that browsers do not run. A content security policy lets the page run just its own
//! script and style, by their hashes, and load nothing.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tdfs_common::digest::Digest;

use super::Report;

const PAGE: &str = include_str!("page/report.html");
const STYLE: &str = include_str!("page/report.css");
const SCRIPT: &str = include_str!("page/report.js");

/// The report as a page.
pub fn page(report: &Report) -> serde_json::Result<String> {
    let source =
        |text: &str| format!("'sha256-{}'", BASE64_STANDARD.encode(Digest::of(text.as_bytes()).as_bytes()));
    let policy = format!("default-src 'none'; script-src {}; style-src {}", source(SCRIPT), source(STYLE));
    let data = embedded(&serde_json::to_string(report)?);
    let mut page = String::with_capacity(PAGE.len() + STYLE.len() + SCRIPT.len() + data.len());
    // One pass over the template: what is put in is not looked at again.
    let mut rest = PAGE;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        page.push_str(before);
        page.push_str(match name {
            "policy" => &policy,
            "style" => STYLE,
            "script" => SCRIPT,
            "data" => &data,
            "version" => env!("CARGO_PKG_VERSION"),
            _ => "",
        });
        rest = after;
    }
    page.push_str(rest);
    Ok(page)
}

/// JSON without characters that could end the element around it: they occur only in strings, where an escape means
/// the same.
fn embedded(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' => text.push_str("\\u003c"),
            '>' => text.push_str("\\u003e"),
            '&' => text.push_str("\\u0026"),
            '\u{2028}' => text.push_str("\\u2028"),
            '\u{2029}' => text.push_str("\\u2029"),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::{read, timeline};
    use super::*;

    const HOSTILE: &str = "</script><img src=x onerror=alert(1)>{{style}}<!--\u{2028}&amp;\"'\\";

    fn hostile() -> Report {
        let mut events = timeline(vec![], vec![read(1.0, 1.0, 0)]);
        events.files[0].path = HOSTILE.into();
        events.reference = HOSTILE.into();
        Report::new(None, None, Some(events)).unwrap()
    }

    fn data(page: &str) -> &str {
        let after = page.split_once("<script type=\"application/json\" id=\"data\">").unwrap().1;
        after.split_once("</script>").unwrap().0
    }

    #[test]
    fn names_stay_text() {
        let page = page(&hostile()).unwrap();
        assert!(!page.contains("<img"));
        let data: serde_json::Value = serde_json::from_str(data(&page)).unwrap();
        assert_eq!(data["reference"], HOSTILE);
        assert_eq!(data["start"]["timeline"]["files"][0]["path"], HOSTILE);
    }

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        let page = page(&hostile()).unwrap();
        for own in [STYLE, SCRIPT] {
            assert!(page.contains(own));
            assert!(!own.contains("</") || !own.contains("</script"));
        }
        assert!(page.contains("default-src 'none'; script-src 'sha256-"));
        for outside in
            [" src=", " href=\"http", "@import", "url(", "innerHTML", "insertAdjacentHTML", "eval("]
        {
            assert!(
                !PAGE.contains(outside) && !STYLE.contains(outside) && !SCRIPT.contains(outside),
                "{outside}"
            );
        }
    }
}
