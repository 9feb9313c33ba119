//! Level 7. Progress bars.

use std::ops::ControlFlow;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::Output;
use crate::data::fetch::{self, FetchOptions, Stage};
use crate::data::files::folder;
use crate::error::Result;

/// A bar of `len` units in this style of indicatif's.
pub(super) fn bar(len: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is a constant of ours");
    ProgressBar::new(len).with_style(style)
}

/// [`fetch::fetch`] with a progress bar, or with a line for every tenth where nobody watches.
pub(super) fn fetch(options: &FetchOptions, out: &Output) -> Result<PathBuf> {
    let watched = out.is_watched();
    let mut shown = None;
    let mut tenth = 0;
    let mut current = None;
    let folder = fetch::fetch(options, &mut |progress| {
        if shown != Some(progress.stage) {
            shown = Some(progress.stage);
            tenth = 0;
            out.finish_bar();
            let verb = match progress.stage {
                Stage::Download => "downloading",
                Stage::Verify => "checking",
                Stage::Unpack => "unpacking",
            };
            if watched {
                let bar = bar(
                    progress.total,
                    "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left",
                );
                bar.set_message(verb);
                // What an earlier run received says nothing about the speed of this one.
                bar.set_position(progress.received);
                bar.reset_eta();
                out.show_bar(bar.clone());
                current = Some(bar);
            } else {
                out.note(format_args!("{verb} CIFAR-10 ({} MB)", progress.total / 1_000_000));
            }
        }
        if let Some(bar) = &current {
            bar.set_position(progress.received);
        } else if progress.stage == Stage::Download && 10 * progress.received / progress.total.max(1) > tenth {
            tenth = 10 * progress.received / progress.total;
            out.note(format_args!("{} of {} MB", progress.received / 1_000_000, progress.total / 1_000_000));
        }
        ControlFlow::Continue(())
    });
    out.finish_bar();
    folder
}

/// Runs `work`, which decodes pictures, with a progress bar, or with a line at its start where nobody watches.
pub(super) fn decoding<R>(out: &Output, work: impl FnOnce(&mut dyn FnMut(folder::Progress)) -> R) -> R {
    let mut current = None;
    let done = work(&mut |progress| {
        let start = || {
            if out.is_watched() {
                let bar = bar(progress.total as u64, "decoding pictures {bar:30} {pos}/{len} {per_sec} {eta} left");
                out.show_bar(bar.clone());
                return bar;
            }
            out.note(format_args!("decoding {} pictures", progress.total));
            ProgressBar::hidden()
        };
        current.get_or_insert_with(start).set_position(progress.done as u64);
    });
    out.finish_bar();
    done
}
