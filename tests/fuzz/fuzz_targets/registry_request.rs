//! Any text as what a client of the registry sends: paths, ranges, digests, credentials. What is taken can be a key
//! of the storage, and lies within what it is a part of.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tdfs_agent::registry::request::{
    ManifestName, Route, Scope, Wanted, basic_credentials, content_range, digest,
};

fuzz_target!(|input: (&str, u64)| {
    let (text, size) = input;
    for path in [text.to_owned(), format!("/v2/{text}"), format!("/v2/{text}/tags/list")] {
        let Ok(route) = Route::parse(&path) else { continue };
        let (Route::Tags(name)
        | Route::Referrers(name, _)
        | Route::Manifest(name, _)
        | Route::Blob(name, _)
        | Route::Uploads(name)
        | Route::Upload(name, _)) = &route
        else {
            continue;
        };
        for part in name.as_str().split('/') {
            assert!(part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()));
            assert!(part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b)));
        }
        if let Route::Manifest(_, ManifestName::Tag(tag)) = &route {
            assert!(!tag.starts_with('.') && !tag.contains('/'));
        }
    }
    for header in [text.to_owned(), format!("bytes={text}")] {
        if let Wanted::Part(range) = Wanted::parse(Some(&header), size) {
            assert!(range.start < range.end && range.end <= size);
        }
    }
    if let Some(range) = content_range(text) {
        assert!(range.start < range.end);
    }
    if let Ok(digest) = digest(text) {
        assert_eq!(digest.to_string(), text);
    }
    let _ = basic_credentials(text);
    if let Some(scope) = Scope::parse(text) {
        assert_eq!(Scope::parse(&scope.to_string()), Some(scope));
    }
});
