//! Level 5. Downloads CIFAR-10: resumable, checked, and in place only when complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::{Response, header};

use super::cifar10::{self, FOLDER, NAMES, OFFICIAL_RECORDS, TEST_BATCH, TRAIN_BATCHES};
use crate::error::{Error, Result};

/// Where the archive is published.
pub const OFFICIAL_URL: &str = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
/// The environment variable with another address of the same archive.
pub const MIRROR_VARIABLE: &str = "GEMMNET_CIFAR10_URL";
/// The archive's name; a file of this name in the destination is used instead of a download.
pub const ARCHIVE: &str = "cifar-10-binary.tar.gz";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest silence between two bytes. The official host is slow at times, but not that slow.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// What to download and where to.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// The batches go to `cifar-10-batches-bin` in this folder, which is made if need be.
    pub dir: PathBuf,
    /// The archive's address; if none, that of `GEMMNET_CIFAR10_URL`; if none, the official one.
    pub url: Option<String>,
}

/// What [`fetch`] is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Receiving the archive.
    Download,
    /// Computing its SHA-256.
    Verify,
    /// Writing the batches.
    Unpack,
}

/// How far [`fetch`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Bytes of the archive that this stage has dealt with, those of an earlier run included.
    pub received: u64,
    /// Bytes of the archive.
    pub total: u64,
}

/// Downloads CIFAR-10's binary archive (170 MB), checks its size and SHA-256, unpacks it (184 MB) and returns the folder
/// with the batches. Does nothing if that folder already holds them, and goes on where an earlier run stopped.
///
/// `progress` is called after every piece; [`ControlFlow::Break`] stops, and what has arrived is kept.
///
/// # Errors
/// [`Error::Download`] if the archive does not arrive, is another one, or `progress` stops it; [`Error::Io`] if it cannot
/// be written; [`Error::Data`] if the destination holds something else; [`Error::Invalid`] for an address that is none.
pub fn fetch(options: &FetchOptions, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<PathBuf> {
    let url = options
        .url
        .clone()
        .or_else(|| std::env::var(MIRROR_VARIABLE).ok().filter(|url| !url.is_empty()))
        .unwrap_or_else(|| OFFICIAL_URL.to_string());
    Fetch { dir: &options.dir, url: &url, expected: OFFICIAL, progress }.run()
}

/// What the archive must be.
#[derive(Clone, Copy, Debug)]
struct Expected<'a> {
    bytes: u64,
    sha256: &'a str,
    /// Records in each batch.
    records: usize,
}

const OFFICIAL: Expected<'static> = Expected {
    bytes: 170_052_171,
    sha256: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    records: OFFICIAL_RECORDS,
};

struct Fetch<'a> {
    dir: &'a Path,
    url: &'a str,
    expected: Expected<'a>,
    progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
}

impl Fetch<'_> {
    fn run(mut self) -> Result<PathBuf> {
        if !self.url.starts_with("https://") && !self.url.starts_with("http://") {
            let problem = format!("`{}` is no address of a file on the web", self.url);
            return Err(Error::invalid("mirror", problem, "start it with https://"));
        }
        let folder = self.dir.join(FOLDER);
        if folder.exists() {
            let report = cifar10::verify(&folder);
            if report.problems.is_empty() {
                if report.batches.iter().all(|batch| batch.1 == self.expected.records) {
                    return Ok(folder);
                }
                let problem = format!("already holds other batches, not of {} records each", self.expected.records);
                return Err(Error::data(folder, problem, "remove it or choose another folder"));
            }
            // Broken batches are what a fetch is to repair.
        }
        fs::create_dir_all(self.dir).map_err(|e| self.cannot_write(self.dir, e))?;

        let by_hand = self.dir.join(ARCHIVE);
        if by_hand.exists() {
            if let Some(problem) = self.mismatch(&by_hand)? {
                return Err(Error::data(by_hand, problem, "remove it, then run this again to download it"));
            }
            self.unpack(&by_hand, &folder)?;
            return Ok(folder);
        }
        let part = self.dir.join(format!("{ARCHIVE}.part"));
        self.download(&part)?;
        if let Some(problem) = self.mismatch(&part)? {
            fs::remove_file(&part).map_err(|e| Error::io("remove", &part, e, "remove it yourself"))?;
            return Err(self.failure(
                format!("{problem}; it was deleted"),
                format!("run this again, or try another address with --mirror or {MIRROR_VARIABLE}"),
            ));
        }
        self.unpack(&part, &folder)?;
        fs::remove_file(&part)
            .map_err(|e| Error::io("remove", &part, e, "remove it yourself; the data is complete"))?;
        Ok(folder)
    }

    /// Makes `part` as long as the archive.
    fn download(&mut self, part: &Path) -> Result<()> {
        let mut have = fs::metadata(part).map_or(0, |m| m.len());
        if have > self.expected.bytes {
            have = 0;
        }
        self.report(Stage::Download, have)?;
        if have == self.expected.bytes {
            return Ok(());
        }
        let mut response = self.request(have)?;
        let mut offset = start_of(&response);
        if have > 0 && offset.is_none_or(|offset| offset != 0 && offset != have) {
            // The server does not like to go on (416) or would go on elsewhere: once more, from the start.
            response = self.request(0)?;
            offset = start_of(&response);
        }
        let Some(offset) = offset else {
            return Err(self.failure(format!("the server answered {}", response.status()), self.other_ways()));
        };
        if let Some(length) = response.body().content_length()
            && offset + length != self.expected.bytes
        {
            let problem = format!("the server has {} bytes, the archive {}", offset + length, self.expected.bytes);
            return Err(self.failure(problem, self.other_ways()));
        }

        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(offset == 0)
            .append(offset > 0)
            .open(part)
            .map_err(|e| self.cannot_write(part, e))?;
        let mut received = offset;
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 1 << 16];
        while received < self.expected.bytes {
            let piece = (self.expected.bytes - received).min(buffer.len() as u64) as usize;
            let cut_off = |problem: String| {
                let problem = format!("{problem} after {received} of {} bytes", self.expected.bytes);
                self.failure(problem, "run this again to go on from there")
            };
            let n = match body.read(&mut buffer[..piece]) {
                Ok(0) => return Err(cut_off("the connection ended".into())),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(cut_off(e.to_string())),
            };
            file.write_all(&buffer[..n]).map_err(|e| self.cannot_write(part, e))?;
            received += n as u64;
            self.report(Stage::Download, received)?;
        }
        file.sync_all().map_err(|e| self.cannot_write(part, e))
    }

    /// Asks for the archive from byte `from` on.
    fn request(&self, from: u64) -> Result<Response<ureq::Body>> {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .http_status_as_error(false)
            // The archive is compressed already, and its size is checked.
            .accept_encoding("identity")
            .user_agent(concat!("gemmnet/", env!("CARGO_PKG_VERSION")))
            .build();
        let mut request = ureq::Agent::new_with_config(config).get(self.url);
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|e| {
            let problem = match e {
                ureq::Error::Io(e) => e.to_string(),
                ureq::Error::Timeout(_) => "no answer in time".to_string(),
                other => other.to_string(),
            };
            self.failure(problem, self.other_ways())
        })
    }

    /// In what `file` differs from the archive, if it does.
    fn mismatch(&mut self, file: &Path) -> Result<Option<String>> {
        let unreadable = |e| Error::io("read", file, e, "check its permissions and the disk");
        let mut input = File::open(file).map_err(unreadable)?;
        let bytes = input.metadata().map_err(unreadable)?.len();
        if bytes != self.expected.bytes {
            return Ok(Some(format!("it has {bytes} bytes, the archive {}", self.expected.bytes)));
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut done = 0;
        loop {
            let n = input.read(&mut buffer).map_err(unreadable)?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            done += n as u64;
            self.report(Stage::Verify, done)?;
        }
        let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if sha256 == self.expected.sha256 {
            return Ok(None);
        }
        Ok(Some(format!("its SHA-256 is {sha256}, the archive's {}", self.expected.sha256)))
    }

    /// Unpacks `archive` beside `folder` and moves the complete batches there.
    fn unpack(&mut self, archive: &Path, folder: &Path) -> Result<()> {
        let failed =
            |e| Error::io("unpack", archive, e, format!("check that {} has 200 MB of free space", self.dir.display()));
        let beside = tempfile::Builder::new().prefix(".cifar-10-").tempdir_in(self.dir).map_err(failed)?;
        let fresh = beside.path().join(FOLDER);
        fs::create_dir(&fresh).map_err(failed)?;
        let input = File::open(archive).map_err(failed)?;
        let mut entries = tar::Archive::new(flate2::read::GzDecoder::new(&input));
        for entry in entries.entries().map_err(failed)? {
            let mut entry = entry.map_err(failed)?;
            // By its bare name, so that nothing can be written elsewhere.
            let name = entry.path().map_err(failed)?.file_name().and_then(|name| name.to_str()).map(String::from);
            if let Some(name) = name.filter(|name| is_wanted(name)) {
                let mut output = File::create(fresh.join(name)).map_err(failed)?;
                io::copy(&mut entry, &mut output).map_err(failed)?;
                output.sync_all().map_err(failed)?;
            }
            let read = io::Seek::stream_position(&mut &input).map_err(failed)?;
            report(self.progress, Stage::Unpack, read, self.expected.bytes, self.url)?;
        }
        if let Some(problem) = cifar10::verify(&fresh).problems.into_iter().next() {
            return Err(problem);
        }
        if folder.exists() {
            fs::rename(folder, beside.path().join("broken")).map_err(failed)?;
        }
        fs::rename(&fresh, folder).map_err(failed)
    }

    fn report(&mut self, stage: Stage, received: u64) -> Result<()> {
        report(self.progress, stage, received, self.expected.bytes, self.url)
    }

    fn failure(&self, problem: impl Into<String>, fix: impl Into<String>) -> Error {
        Error::Download { url: self.url.to_string(), problem: problem.into(), fix: fix.into() }
    }

    fn cannot_write(&self, path: &Path, e: io::Error) -> Error {
        Error::io(
            "write",
            path,
            e,
            "choose a folder that can be written, with 400 MB of free space; run this again to go on",
        )
    }

    /// What else can be done where this address cannot be reached.
    fn other_ways(&self) -> String {
        format!(
            "check the network, or give another address with --mirror or {MIRROR_VARIABLE}, or bring {ARCHIVE} here by \
             other means as {} and run this again; any folder with the six .bin files works with --data-dir",
            self.dir.join(ARCHIVE).display()
        )
    }
}

fn report(
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    stage: Stage,
    received: u64,
    total: u64,
    url: &str,
) -> Result<()> {
    match progress(Progress { stage, received, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Download {
            url: url.to_string(),
            problem: format!("stopped after {received} of {total} bytes"),
            fix: "run this again to go on from there".to_string(),
        }),
    }
}

/// The byte of the archive that the body of `response` starts with, if it holds any of the archive.
fn start_of(response: &Response<ureq::Body>) -> Option<u64> {
    match response.status().as_u16() {
        200 => Some(0),
        // Content-Range: bytes 100-299/300
        206 => {
            let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
            range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
        }
        _ => None,
    }
}

fn is_wanted(name: &str) -> bool {
    TRAIN_BATCHES.contains(&name) || name == TEST_BATCH || name == NAMES
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};

    use super::super::cifar10::RECORD;
    use super::*;

    const RECORDS: usize = 20;

    /// How the server answers one connection.
    #[derive(Clone, Copy)]
    enum Answer {
        /// Whole, or from the byte that was asked for.
        Ranges,
        /// Whole, whatever was asked for.
        Whole,
        /// As `Ranges`, but hangs up after so many bytes.
        Cut(usize),
        /// A status without the archive.
        Status(&'static str),
    }

    /// A web server for one file; it answers one connection after the other as told, and reports from which byte each
    /// asked for the file.
    fn serve(file: Vec<u8>, answers: &'static [Answer]) -> (String, Receiver<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/{ARCHIVE}", listener.local_addr().unwrap());
        let (asked, requests) = channel();
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut start = 0;
                for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                    let line = line.unwrap().to_ascii_lowercase();
                    if let Some(range) = line.strip_prefix("range: bytes=") {
                        start = range.trim_end_matches('-').parse().unwrap();
                    }
                    if line.is_empty() {
                        break;
                    }
                }
                let _ = asked.send(start);
                let (status, body) = match *answer {
                    Answer::Status(status) => (status.to_string(), &b"sorry"[..]),
                    Answer::Ranges | Answer::Cut(_) if start > 0 => {
                        let (last, all) = (file.len() - 1, file.len());
                        let head = format!("206 Partial Content\r\nContent-Range: bytes {start}-{last}/{all}");
                        (head, &file[start..])
                    }
                    _ => ("200 OK".to_string(), &file[..]),
                };
                let sent = if let Answer::Cut(bytes) = *answer { bytes } else { body.len() };
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                // The client may have hung up.
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body[..sent]));
            }
        });
        (url, requests)
    }

    /// An archive like the official one with twenty records a batch, whose pixels are random: nearly 370 KB, several reads.
    fn archive() -> (Vec<u8>, String) {
        use rand::Rng;
        let mut rng = crate::random::stream(0, crate::random::Purpose::Example, 0, 0);
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("{FOLDER}/{name}"), bytes).unwrap();
        };
        for name in TRAIN_BATCHES.into_iter().chain([TEST_BATCH]) {
            let mut bytes = vec![0; RECORDS * RECORD];
            rng.fill_bytes(&mut bytes);
            bytes.iter_mut().step_by(RECORD).for_each(|label| *label %= 10);
            add(name, &bytes);
        }
        add("readme.html", b"not wanted");
        let bytes = tar.into_inner().unwrap().finish().unwrap();
        let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        (bytes, sha256)
    }

    fn run(dir: &Path, url: &str, bytes: usize, sha256: &str) -> Result<PathBuf> {
        let expected = Expected { bytes: bytes as u64, sha256, records: RECORDS };
        Fetch { dir, url, expected, progress: &mut |_| ControlFlow::Continue(()) }.run()
    }

    /// The batches are there and nothing else is left.
    fn assert_complete(dir: &Path, result: Result<PathBuf>) {
        let folder = result.unwrap();
        assert_eq!(folder, dir.join(FOLDER));
        assert_eq!(cifar10::Cifar10::open(&folder).unwrap().test().len(), RECORDS);
        assert_eq!(names(dir), [FOLDER]);
        assert!(!folder.join("readme.html").exists());
    }

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn downloads_in_one_go_and_then_not_again() {
        let (bytes, sha256) = archive();
        let dir = tempfile::tempdir().unwrap();
        let dir = &dir.path().join("made");
        let (url, requests) = serve(bytes.clone(), &[Answer::Ranges]);
        let mut seen = Vec::new();
        let expected = Expected { bytes: bytes.len() as u64, sha256: &sha256, records: RECORDS };
        let result = Fetch {
            dir,
            url: &url,
            expected,
            progress: &mut |p| {
                seen.push(p);
                ControlFlow::Continue(())
            },
        }
        .run();
        assert_complete(dir, result);
        for stage in [Stage::Download, Stage::Verify, Stage::Unpack] {
            let last = seen.iter().rfind(|p| p.stage == stage).unwrap();
            assert_eq!((last.received, last.total), (bytes.len() as u64, bytes.len() as u64), "{stage:?}");
        }
        assert_complete(dir, run(dir, &url, bytes.len(), &sha256));
        assert_eq!(requests.try_iter().collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn goes_on_after_a_cut_whatever_the_server_makes_of_it() {
        let (bytes, sha256) = archive();
        let cases: [(&'static [Answer], &[usize]); 3] = [
            (&[Answer::Cut(20_000), Answer::Ranges], &[0, 20_000]),
            (&[Answer::Cut(20_000), Answer::Whole], &[0, 20_000]),
            (&[Answer::Cut(20_000), Answer::Status("416 Range Not Satisfiable"), Answer::Ranges], &[0, 20_000, 0]),
        ];
        for (answers, offsets) in cases {
            let dir = tempfile::tempdir().unwrap();
            let (url, requests) = serve(bytes.clone(), answers);
            let message = run(dir.path(), &url, bytes.len(), &sha256).unwrap_err().to_string();
            assert!(message.contains("after 20000 of") && message.contains("run this again"), "{message}");
            assert_eq!(fs::metadata(dir.path().join(format!("{ARCHIVE}.part"))).unwrap().len(), 20_000);
            assert_complete(dir.path(), run(dir.path(), &url, bytes.len(), &sha256));
            assert_eq!(requests.try_iter().collect::<Vec<_>>(), offsets);
        }
    }

    #[test]
    fn the_caller_can_stop_and_go_on() {
        let (bytes, sha256) = archive();
        let dir = tempfile::tempdir().unwrap();
        let (url, requests) = serve(bytes.clone(), &[Answer::Ranges, Answer::Ranges]);
        let expected = Expected { bytes: bytes.len() as u64, sha256: &sha256, records: RECORDS };
        let mut progress =
            |p: Progress| if p.received > 10_000 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let message =
            Fetch { dir: dir.path(), url: &url, expected, progress: &mut progress }.run().unwrap_err().to_string();
        assert!(message.contains("stopped after"), "{message}");
        assert_complete(dir.path(), run(dir.path(), &url, bytes.len(), &sha256));
        let second = requests.try_iter().last().unwrap();
        assert!(second > 10_000, "{second}");
    }

    #[test]
    fn another_file_is_not_taken_for_the_archive() {
        let (bytes, sha256) = archive();
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2] ^= 1;
        let dir = tempfile::tempdir().unwrap();
        let (url, _requests) = serve(damaged.clone(), &[Answer::Ranges]);
        let message = run(dir.path(), &url, bytes.len(), &sha256).unwrap_err().to_string();
        assert!(message.contains(&sha256) && message.contains("it was deleted"), "{message}");
        assert!(names(dir.path()).is_empty());

        let (url, _requests) = serve(bytes[1..].to_vec(), &[Answer::Ranges]);
        let message = run(dir.path(), &url, bytes.len(), &sha256).unwrap_err().to_string();
        assert!(message.contains(&format!("the server has {} bytes", bytes.len() - 1)), "{message}");

        // Put there by hand: it is the user's, so it stays.
        fs::write(dir.path().join(ARCHIVE), &damaged).unwrap();
        let message = run(dir.path(), &url, bytes.len(), &sha256).unwrap_err().to_string();
        assert!(message.contains("SHA-256") && message.contains("remove it"), "{message}");
        fs::write(dir.path().join(ARCHIVE), &bytes).unwrap();
        run(dir.path(), &url, bytes.len(), &sha256).unwrap();
        assert!(dir.path().join(ARCHIVE).exists());
    }

    #[test]
    fn an_unreachable_archive_says_what_else_to_do() {
        let (bytes, sha256) = archive();
        let dir = tempfile::tempdir().unwrap();
        let nobody = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}/", listener.local_addr().unwrap())
        };
        let (gone, _requests) = serve(Vec::new(), &[Answer::Status("404 Not Found")]);
        for (url, reason) in [(nobody, "refused"), (gone, "404 Not Found")] {
            let message = run(dir.path(), &url, bytes.len(), &sha256).unwrap_err().to_string();
            let place = dir.path().join(ARCHIVE).display().to_string();
            for part in [reason, &url, &place, "--mirror", MIRROR_VARIABLE, "--data-dir"] {
                assert!(message.contains(part), "`{part}` is not in: {message}");
            }
        }
        let message = run(dir.path(), "cifar.example", 1, "").unwrap_err().to_string();
        assert!(message.contains("`cifar.example`"), "{message}");
    }

    #[test]
    fn broken_batches_are_replaced_and_other_batches_are_not() {
        let (bytes, sha256) = archive();
        let dir = tempfile::tempdir().unwrap();
        let (url, _requests) = serve(bytes.clone(), &[Answer::Ranges]);
        let folder = dir.path().join(FOLDER);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(TEST_BATCH), [0; 100]).unwrap();
        assert_complete(dir.path(), run(dir.path(), &url, bytes.len(), &sha256));

        fs::write(folder.join(TEST_BATCH), [0; RECORD]).unwrap();
        let message = run(dir.path(), &url, bytes.len(), &sha256).unwrap_err().to_string();
        assert!(message.contains("other batches"), "{message}");
        assert_eq!(fs::metadata(folder.join(TEST_BATCH)).unwrap().len(), RECORD as u64);
    }
}
