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
    use proptest::prelude::*;

    use super::super::model::tests::{read, timeline};
    use super::super::trace;
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

    proptest! {
        /// Files of events that were damaged on purpose: an error or a page, and never a number that breaks it.
        #[test]
        fn any_events_are_refused_or_drawn(
            places in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..5),
        ) {
            const VALUES: [&str; 9] = ["0", "-1", "1e300", "18446744073709551615", "null", "{}", "[]", "\"</script>\"", "7"];
            let reads = |n: u32| (0..n).map(|f| read(f.into(), 2.0, f)).collect();
            let mut events = serde_json::to_value(timeline(reads(3), reads(5))).unwrap();
            for (place, value) in places {
                let mut leaves = Vec::new();
                leaves_of(&events, "", &mut leaves);
                let leaf = events.pointer_mut(&leaves[place.index(leaves.len())]).unwrap();
                *leaf = serde_json::from_str(VALUES[value.index(VALUES.len())]).unwrap();
            }
            let Ok(events) = serde_json::from_value(events) else { return Ok(()) };
            let Ok(report) = Report::new(None, None, Some(events)) else { return Ok(()) };
            let page = page(&report).unwrap();
            let drawn: serde_json::Value = serde_json::from_str(data(&page)).unwrap();
            prop_assert_eq!(drawn, serde_json::to_value(&report).unwrap());
            let start = report.start.unwrap();
            prop_assert!(trace(&start.timeline)["traceEvents"].is_array());
        }
    }

    /// JSON pointers to everything in `value` that holds nothing else.
    fn leaves_of(value: &serde_json::Value, at: &str, leaves: &mut Vec<String>) {
        match value {
            serde_json::Value::Array(all) if !all.is_empty() => {
                all.iter().enumerate().for_each(|(n, v)| leaves_of(v, &format!("{at}/{n}"), leaves));
            }
            serde_json::Value::Object(all) if !all.is_empty() => {
                all.iter().for_each(|(name, v)| leaves_of(v, &format!("{at}/{name}"), leaves));
            }
            _ => leaves.push(at.to_owned()),
        }
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
