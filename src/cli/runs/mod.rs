//! Level 7. Runs: the folders that trainings leave.
//!
//! | file | holds |
//! | --- | --- |
//! | `config.toml` | all that is needed to train the same again; `train --config` takes it |
//! | `history.jsonl` | what happened, an object a line: [`events`] |
//! | `model.safetensors` | the network that is kept, with class names and what normalises pixels |
//! | `checkpoints/step-N.safetensors` | the last checkpoints, each after `N` iterations |
//! | `evaluation.json` | what the network that is kept makes of the validation images |
//! | `report.html` | all of it to look at |
//!
//! Every file but the history is replaced as a whole. The history has its lines before the checkpoint of the same iteration
//! is written, so whatever a crash leaves can be gone on from: lines beyond the last checkpoint are forgotten.

pub(super) mod events;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use events::{Entry, Epoch, Step};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::recipe::Choices;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::store::replace;
use crate::train::Checkpoint;

/// Where runs are made that are not given a folder.
pub(super) const RUNS: &str = "runs";

/// A run that is being trained: nobody else writes into its folder.
#[derive(Debug)]
pub(super) struct Run {
    dir: PathBuf,
    history: File,
    /// Seconds of training that the history tells of.
    pub(super) seconds: f64,
    /// Holds the lock on the folder.
    _lock: File,
}

impl Run {
    /// A new run in this folder.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let checkpoints = checkpoints(dir);
        fs::create_dir(&checkpoints).map_err(|e| unmade(&checkpoints, e))?;
        Self::open(dir)
    }

    /// The folder of a run that is there.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let fix = "give the folder of a run, which `gemmnet train` has made";
        let lock = File::open(dir).map_err(|e| Error::io("read", dir, e, fix))?;
        // Another failure than this one is a file system without locks.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(Error::data(dir, "is being trained by another program", "wait until that has ended"));
        }
        if !checkpoints(dir).is_dir() {
            return Err(Error::data(dir, "is not the folder of a run", fix));
        }
        Ok(Run { history: open_lines(&history(dir))?, dir: dir.to_owned(), seconds: 0.0, _lock: lock })
    }

    /// Forgets what the history tells of after `step` iterations.
    pub(super) fn go_on_after(&mut self, step: usize) -> Result<()> {
        let mut kept = entries(&self.dir)?;
        // It goes on, so it has not ended.
        kept.retain(|entry| entry.step() <= step && !matches!(entry, Entry::End(_)));
        for entry in &kept {
            if let Entry::Step(Step { seconds, .. }) | Entry::Epoch(Epoch { seconds, .. }) = entry {
                self.seconds = *seconds;
            }
        }
        self.history = rewrite(&history(&self.dir), &kept)?;
        Ok(())
    }

    /// Removes a run that has done nothing.
    pub(super) fn discard(&self) {
        // What cannot be removed does no harm; `runs` can only be if it is empty.
        let _ = fs::remove_dir_all(&self.dir);
        if self.dir.parent() == Some(Path::new(RUNS)) {
            let _ = fs::remove_dir(RUNS);
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds a line to the history. A measured epoch waits for the disk, as the checkpoint will that follows it.
    pub(super) fn record(&mut self, entry: &Entry) -> Result<()> {
        append(&mut self.history, &history(&self.dir), entry, !matches!(entry, Entry::Step(_)))
    }

    /// Writes the config.toml. One that says something else stays beside it, as that of the first `step` iterations.
    pub(super) fn write_config(&self, text: &str, step: usize) -> Result<()> {
        let path = config(&self.dir);
        match fs::read_to_string(&path) {
            Ok(before) if before == text => return Ok(()),
            Ok(before) => replace(&self.dir.join(format!("config-until-{step}.toml")), before.as_bytes())?,
            Err(_) => {}
        }
        replace(&path, text.as_bytes())
    }

    /// Writes the file of this name, in the place of one that is there.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        replace(&self.dir.join(name), bytes)
    }

    /// What saves checkpoints, of which the `last` stay, and the network that is kept.
    pub(super) fn saver<T: Element>(
        &self,
        last: usize,
    ) -> impl FnMut(&Checkpoint<T>) -> Result<()> + Send + Sync + 'static {
        let dir = self.dir.clone();
        let mut saved = None;
        move |checkpoint| {
            let kept = checkpoint.trained.history.kept(checkpoint.options.keep);
            if saved.is_none() || kept != saved {
                checkpoint.trained.save_model(&model(&dir))?;
                saved = kept;
            }
            checkpoint.save(&checkpoints(&dir).join(format!("step-{}.safetensors", checkpoint.step())))?;
            forget(&dir, last)
        }
    }
}

/// A new folder: the one that is asked for, else number 1 in `above`, or the next that is free.
pub(super) fn new_folder(asked: Option<&Path>, above: &str) -> Result<PathBuf> {
    let Some(dir) = asked else { return next_free(Path::new(above)) };
    match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => {}
        Err(_) if !dir.exists() => fs::create_dir_all(dir).map_err(|e| unmade(dir, e))?,
        _ => {
            let fix = format!("choose another with --run, or go on with it: --resume {}", dir.display());
            return Err(Error::data(dir, "exists already, and everything new gets a folder of its own", fix));
        }
    }
    Ok(dir.to_owned())
}

fn next_free(above: &Path) -> Result<PathBuf> {
    fs::create_dir_all(above).map_err(|e| unmade(above, e))?;
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<usize>().ok();
    let taken = fs::read_dir(above).map_err(|e| unmade(above, e))?.filter_map(|entry| number(entry.ok()?)).max();
    let mut next = taken.unwrap_or(0) + 1;
    loop {
        let dir = above.join(next.to_string());
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            // Somebody else was faster.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => next += 1,
            Err(e) => return Err(unmade(&dir, e)),
        }
    }
}

fn unmade(dir: &Path, e: io::Error) -> Error {
    Error::io("create", dir, e, "choose a folder that can be made with --run")
}

/// What the network that is kept makes of the validation images.
pub(super) const EVALUATION: &str = "evaluation.json";

pub(super) fn config(dir: &Path) -> PathBuf {
    dir.join("config.toml")
}

pub(super) fn history(dir: &Path) -> PathBuf {
    dir.join("history.jsonl")
}

fn model(dir: &Path) -> PathBuf {
    dir.join("model.safetensors")
}

fn checkpoints(dir: &Path) -> PathBuf {
    dir.join("checkpoints")
}

/// A file with an object on each line, to be added to.
fn open_lines(path: &Path) -> Result<File> {
    let fix = "choose a folder that can be written";
    OpenOptions::new().append(true).create(true).open(path).map_err(|e| Error::io("write", path, e, fix))
}

/// Puts these objects in the place of all that such a file has; what takes its place is to be added to.
pub(super) fn rewrite(path: &Path, objects: &[impl Serialize]) -> Result<File> {
    replace(path, objects.iter().map(line).collect::<String>().as_bytes())?;
    open_lines(path)
}

/// Adds an object to such a file, which is `path`, and waits for the disk if it is to.
pub(super) fn append(file: &mut File, path: &Path, object: &impl Serialize, sync: bool) -> Result<()> {
    let written = file.write_all(line(object).as_bytes());
    let written = written.and_then(|()| if sync { file.sync_data() } else { Ok(()) });
    written.map_err(|e| Error::io("write", path, e, "free some space on the disk, then go on with --resume"))
}

fn line(object: &impl Serialize) -> String {
    serde_json::to_string(object).expect("plain data has a JSON form") + "\n"
}

/// What the history tells.
pub(super) fn entries(dir: &Path) -> Result<Vec<Entry>> {
    lines(&history(dir))
}

/// The objects of a file that has one on each line. Whatever a crash has left of the last line is none.
pub(super) fn lines<L: DeserializeOwned>(path: &Path) -> Result<Vec<L>> {
    let text = fs::read(path).map_err(|e| Error::io("read", path, e, "give the folder of a run"))?;
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let lines = text[..whole].split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    let read = |(number, line): (usize, &[u8])| {
        serde_json::from_slice(line).map_err(|e| {
            let problem = format!("line {} cannot be read ({e})", number + 1);
            Error::data(path, problem, "remove the line, or the file: what follows can do without")
        })
    };
    lines.map(read).collect()
}

/// The files in a run's folder of checkpoints.
#[derive(Debug, Default)]
struct Saved {
    /// By their iterations, the newest last.
    checkpoints: Vec<(usize, PathBuf)>,
    /// What interrupted writing has left.
    rest: Vec<PathBuf>,
}

fn saved(dir: &Path) -> Result<Saved> {
    let folder = checkpoints(dir);
    let fix = "give the folder of a run, which `gemmnet train` has made";
    let unreadable = |e| Error::io("read", &folder, e, fix);
    let mut saved = Saved::default();
    for entry in fs::read_dir(&folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("step-").and_then(|name| name.strip_suffix(".safetensors"));
        match number.and_then(|number| number.parse().ok()) {
            Some(step) => saved.checkpoints.push((step, path)),
            None if name.starts_with(".tmp") => saved.rest.push(path),
            None => {}
        }
    }
    saved.checkpoints.sort();
    Ok(saved)
}

/// Removes all checkpoints but the `last`.
fn forget(dir: &Path, last: usize) -> Result<()> {
    let Saved { mut checkpoints, rest } = saved(dir)?;
    checkpoints.truncate(checkpoints.len().saturating_sub(last));
    for path in checkpoints.into_iter().map(|(_, path)| path).chain(rest) {
        fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e, "check who may write into its folder"))?;
    }
    Ok(())
}

/// The newest checkpoint of a run, to go on from, and where it was.
pub(super) fn load_checkpoint<T: Element>(dir: &Path) -> Result<(PathBuf, Checkpoint<T>)> {
    let path = newest_checkpoint(dir)?;
    match Checkpoint::load(&path) {
        Ok(checkpoint) => Ok((path, checkpoint)),
        Err(Error::Data { path, problem, fix }) => {
            let before = saved(dir)?.checkpoints.into_iter().rev().nth(1);
            // None that fails in the same way, as those of a newer program or of another element type do.
            let fix = match before.filter(|(_, path)| Checkpoint::<T>::load(path).is_ok()) {
                Some((step, _)) => format!("{fix}; or remove this file, to go on from iteration {step}"),
                None => fix,
            };
            Err(Error::Data { path, problem, fix })
        }
        Err(e) => Err(e),
    }
}

/// The file of [`load_checkpoint`].
pub(super) fn newest_checkpoint(dir: &Path) -> Result<PathBuf> {
    saved(dir)?.checkpoints.pop().map(|(_, path)| path).ok_or_else(|| {
        let fix = format!("begin anew: gemmnet train --config {}", config(dir).display());
        Error::data(dir, "has no checkpoint: the run ended before its first epoch", fix)
    })
}

/// The file of a saved network: this file, that of the run in this folder, or that of the last run in `runs`.
pub(super) fn saved_network(asked: Option<&Path>) -> Result<PathBuf> {
    let dir = match asked {
        Some(path) if !path.is_dir() => return Ok(path.to_owned()),
        Some(dir) => dir.to_owned(),
        None => last_run()?,
    };
    let path = model(&dir);
    if !path.is_file() {
        let fix = "give the folder of a run that has finished an epoch, or a file with a network";
        return Err(Error::data(dir, "has no model.safetensors", fix));
    }
    Ok(path)
}

/// Where the data of the run is that this network is of, if it is one's.
pub(super) fn data_dir(network: &Path) -> Result<Option<PathBuf>> {
    let config = config(network.parent().unwrap_or(Path::new("")));
    if config.is_file() { Ok(Choices::read(&config)?.data_dir) } else { Ok(None) }
}

/// The run whose network was written last.
fn last_run() -> Result<PathBuf> {
    let entries = fs::read_dir(RUNS).into_iter().flatten().flatten();
    let written = |entry: fs::DirEntry| Some((fs::metadata(model(&entry.path())).ok()?.modified().ok()?, entry.path()));
    entries.filter_map(written).max().map(|(_, dir)| dir).ok_or_else(|| {
        let fix = "train a network with `gemmnet train`, or name a file or a run's folder with --checkpoint";
        Error::data(RUNS, "has no run with a network", fix)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> Entry {
        Entry::Step(Step { step, loss: 2.5, learning_rate: 1e-3, seconds: step as f64 / 8.0 })
    }

    #[test]
    fn a_run_goes_on_with_the_lines_that_its_checkpoint_knows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine");
        let mut run = Run::create(&new_folder(Some(&path), RUNS).unwrap()).unwrap();
        (1..=5).for_each(|i| run.record(&step(i)).unwrap());
        let error = Run::open(&path).unwrap_err().to_string();
        assert!(error.contains("is being trained by another program"), "{error}");
        drop(run);
        // A line that a crash has torn.
        let mut file = open_lines(&history(&path)).unwrap();
        file.write_all(br#"{"event":"step","st"#).unwrap();
        let mut run = Run::open(&path).unwrap();
        run.go_on_after(3).unwrap();
        assert_eq!(run.seconds, 3.0 / 8.0);
        run.record(&step(4)).unwrap();
        assert_eq!(entries(&path).unwrap(), [1, 2, 3, 4].map(step));
        run.write_config("a = 1", 0).unwrap();
        run.write_config("a = 1", 3).unwrap();
        run.write_config("a = 2", 4).unwrap();
        assert!(!path.join("config-until-3.toml").exists());
        assert_eq!(fs::read_to_string(path.join("config-until-4.toml")).unwrap(), "a = 1");
        drop(run);
        let error = new_folder(Some(&path), RUNS).unwrap_err().to_string();
        assert!(error.contains("exists already") && error.contains("--resume"), "{error}");
        fs::write(history(&path), "{}\n").unwrap();
        assert!(entries(&path).unwrap_err().to_string().contains("line 1 cannot be read"));
    }

    #[test]
    fn the_last_checkpoints_stay() {
        let dir = tempfile::tempdir().unwrap();
        Run::create(dir.path()).unwrap();
        let error = newest_checkpoint(dir.path()).unwrap_err().to_string();
        assert!(error.contains("ended before its first epoch"), "{error}");
        for name in ["step-9.safetensors", "step-10.safetensors", "step-8.safetensors", ".tmpAbC", "notes.txt"] {
            fs::write(checkpoints(dir.path()).join(name), "").unwrap();
        }
        forget(dir.path(), 2).unwrap();
        let Saved { checkpoints: kept, rest } = saved(dir.path()).unwrap();
        assert_eq!(kept.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [9, 10]);
        assert!(rest.is_empty() && checkpoints(dir.path()).join("notes.txt").exists());
        assert!(newest_checkpoint(dir.path()).unwrap().ends_with("step-10.safetensors"));
        let error = saved_network(Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains("has no model.safetensors"), "{error}");
    }
}
