//! The book against the program: its commands and options exist. Its Rust is run by `cargo test --doc`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const BOOK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/book/src");

/// What `gemmnet WORDS --help` prints.
#[track_caller]
fn help(words: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemmnet"));
    let output = command.args(words.split_whitespace()).arg("--help").output().unwrap();
    assert!(output.status.success(), "`gemmnet {words} --help` fails: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The names of options in a text: `--` and what follows, up to the first character that is no part of a name.
fn options(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("--") {
        let before = text[..at].chars().next_back();
        let name = &text[at + 2..];
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(name.len());
        if name.starts_with(|c: char| c.is_ascii_lowercase()) && before.is_none_or(|c| c != '-') {
            found.push(&text[at..at + 2 + end]);
        }
    }
    found
}

/// The options that a help text declares: each begins a line.
fn declared(help: &str) -> Vec<&str> {
    let begins = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    begins.filter_map(|line| options(line).first().copied()).collect()
}

/// The names of all commands.
fn commands() -> Vec<String> {
    let help = help("");
    let (_, rest) = help.split_once("Commands:\n").expect("the help lists the commands");
    let lines = rest.lines().take_while(|line| !line.trim().is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|&name| name != "help").map(String::from).collect()
}

/// All chapters.
fn chapters() -> Vec<PathBuf> {
    let files = [BOOK.into(), Path::new(BOOK).join("convolution")]
        .into_iter()
        .flat_map(|dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()));
    files.filter(|path| path.extension().is_some_and(|ending| ending == "md")).collect()
}

#[test]
fn the_chapter_of_commands_names_options_that_exist() {
    let chapter = fs::read_to_string(Path::new(BOOK).join("commands.md")).unwrap();
    let (mut section, mut known) = (String::new(), None);
    let mut checked = 0;
    for (number, line) in (1..).zip(chapter.lines()) {
        if let Some(heading) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            section = heading.strip_prefix("gemmnet ").unwrap_or_default().to_owned();
            known = Some(help(&section));
            continue;
        }
        // What comes before the first section is about cargo.
        let Some(known) = &known else { continue };
        for option in options(line) {
            let problem = format!("line {number}: `gemmnet {section}` has no {option}, says its --help");
            assert!(declared(known).contains(&option), "{problem}");
            checked += 1;
        }
    }
    assert!(checked > 80, "the chapter names {checked} options only: is this test reading it?");
    for command in commands() {
        assert!(
            chapter.contains(&format!("\n## gemmnet {command}\n")),
            "the book has no section on `gemmnet {command}`"
        );
    }
}

#[test]
fn every_command_and_script_in_the_book_exists() {
    let (commands, mut found) = (commands(), 0);
    for path in chapters() {
        let text = fs::read_to_string(&path).unwrap();
        for block in text.split("```sh\n").skip(1) {
            for line in block.split("```").next().unwrap_or_default().lines() {
                let mut words = line.split_whitespace();
                match words.next() {
                    Some("gemmnet") => {
                        let command = words.next().unwrap_or_default();
                        assert!(commands.iter().any(|known| known == command), "{}: `{line}`", path.display());
                        found += 1;
                    }
                    Some(script) if script.starts_with("scripts/") => {
                        let there = Path::new(env!("CARGO_MANIFEST_DIR")).join(script).exists();
                        assert!(there, "{}: there is no {script}", path.display());
                    }
                    _ => {}
                }
            }
        }
    }
    assert!(found > 30, "only {found} commands were found in the book");
}

/// The table of contents names every chapter, and nothing else.
#[test]
fn the_table_of_contents_is_complete() {
    let summary = fs::read_to_string(Path::new(BOOK).join("SUMMARY.md")).unwrap();
    let links = summary.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let mut listed: Vec<_> = links.map(|link| Path::new(BOOK).join(link)).collect();
    let mut there: Vec<_> = chapters().into_iter().filter(|path| !path.ends_with("SUMMARY.md")).collect();
    listed.sort();
    there.sort();
    assert_eq!(listed, there);
}
