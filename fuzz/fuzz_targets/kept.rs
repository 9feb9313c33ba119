//! What is kept of a folder of pictures, changed by somebody else: no panic; it is used if it fits, and made anew if not.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use gemmnet::data::Source;
use gemmnet::data::files::folder::{Options, open};
use gemmnet_fuzz::{check_error, check_source, files, folder};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

const NAMES: [&str; 4] = ["meta.json", "images.npy", "labels.npy", "some"];

/// A folder of three pictures in two classes, one of them broken.
static PICTURES: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = folder();
    for (class, names) in [("a", &["1.png", "2.png"][..]), ("b", &["1.png"])] {
        let class = dir.path().join("pictures").join(class);
        std::fs::create_dir_all(&class).expect("our own folder");
        for name in names {
            image::RgbImage::new(8, 8).save(class.join(name)).expect("our own folder");
        }
    }
    std::fs::write(dir.path().join("pictures/a/3.png"), "none").expect("our own folder");
    dir
});

/// The one folder within another, twice.
fn inner(dir: &Path) -> PathBuf {
    (0..2).fold(dir.to_owned(), |dir, _| {
        let mut entries = std::fs::read_dir(dir).expect("our own folder").flatten();
        entries.next().expect("what is kept of the one folder").path()
    })
}

fuzz_target!(|data: &[u8]| {
    let (pictures, cache) = (PICTURES.path().join("pictures"), PICTURES.path().join("cache"));
    let options = |strict| Options { size: Some([8, 8]), strict };
    // What the last input has left is not looked at.
    let _ = std::fs::remove_dir_all(&cache);
    open(&pictures, options(false), &cache, &mut |_| {}).expect("whole pictures");
    let place = inner(&cache);
    for (name, bytes) in files(data, &NAMES) {
        let path = place.join(if name == "some" { "meta.json" } else { name });
        let mut bytes = bytes.into_owned();
        if name == "some" {
            // Entries of the object that is there, which has a fingerprint that no input has.
            let Ok(changes) = serde_json::from_slice::<Map<String, Value>>(&bytes) else { continue };
            let Ok(old) = std::fs::read(&path) else { continue };
            let Ok(mut meta) = serde_json::from_slice::<Map<String, Value>>(&old) else { continue };
            meta.extend(changes);
            bytes = serde_json::to_vec(&meta).expect("an object has a JSON form");
        }
        // Mapped files may not be changed, but replaced.
        let _ = std::fs::remove_file(&path);
        std::fs::write(path, bytes).expect("our own folder");
    }
    if let Err(error) = open(&pictures, options(true), &cache, &mut |_| {}) {
        check_error(&error);
    }
    let source = open(&pictures, options(false), &cache, &mut |_| {}).expect("whole pictures");
    assert_eq!(source.dim(), [3, 8, 8]);
    check_source(source);
});
