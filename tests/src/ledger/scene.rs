//! Where faults happen: an application of two pods that is intercepted, an unprivileged laptop, and load from both.

use std::ops::Range;
use std::process::Command;
use std::time::Duration;

use super::book::{Book, Load, Serving};
use super::join::{Expectation, Report};
use super::record::now;
use crate::cluster::Cluster;
use crate::laptop::Laptop;
use crate::process::tool;
use crate::user::User;
use crate::wait::eventually;
use crate::workload::Namespace;

/// Flows of each load; at most so many requests of each are under way.
pub const FLOWS: u32 = 8;
/// Requests of each load. A scene has two that carry requests of mine.
pub const PER_SECOND: u32 = 100;
/// What makes a request mine.
pub const HEADER: &str = "x-tp-user: ada";
/// A client is told within this time, whatever dies.
const DEADLINE: Duration = Duration::from_secs(5);

/// Seeds of a scenario: one of its own, and 20 where `TP_SOAK` is set.
pub fn seeds(own: u64) -> impl Iterator<Item = u64> {
    let count = match std::env::var_os("TP_SOAK") {
        Some(_) => 20,
        None => 1,
    };
    (0..count).map(move |more| own + 100 * more)
}

/// `app` with two pods in the cluster, and a laptop that is connected.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The application's namespace.
    pub namespace: Namespace<'a>,
    /// The laptop of a user who may intercept there.
    pub laptop: Laptop,
    /// Who had what.
    pub book: Book,
    seed: u64,
}

impl<'a> Scene<'a> {
    /// Everything is up, nothing intercepted.
    #[track_caller]
    pub fn new(cluster: &'a Cluster, seed: u64) -> Self {
        let namespace = cluster.namespace("faults");
        let user = User::who_intercepts(cluster, "ada", &namespace);
        let laptop = Laptop::of(cluster, &user);
        let book = Book::new(seed);
        book.deploy(cluster, &namespace, "app", 2);
        laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).ok();
        Self {
            cluster,
            namespace,
            laptop,
            book,
            seed,
        }
    }

    /// The laptop's server, whose replies take `delay`.
    #[track_caller]
    pub fn serve(&self, delay: Duration) -> Serving {
        self.book.serve(&self.laptop, "laptop", 0, delay)
    }

    /// Makes requests with [`HEADER`] mine. They lead to this port of the laptop once it returns.
    #[track_caller]
    pub fn intercept(&self, port: u16) {
        let port = format!("{port}:80");
        let header = HEADER.replace(": ", "=");
        let arguments = ["intercept", "app", "--port", &port, "--http-header"];
        self.laptop.tp(&[&arguments[..], &[&header]].concat()).ok();
    }

    /// Mine and others', on connections that are kept: HTTP/1.1, and streams of HTTP/2.
    #[track_caller]
    pub fn load(&self) -> Vec<Load> {
        vec![
            self.requests("h1", Some(HEADER)),
            self.requests("h2", Some(HEADER)),
        ]
    }

    /// Mine on new connections only, and others' on one that is open all the time: what is open before an agent comes
    /// bypasses it.
    #[track_caller]
    pub fn load_across_attachments(&self) -> Vec<Load> {
        vec![
            self.requests("h1-fresh", Some(HEADER)),
            self.requests("h2", None),
        ]
    }

    /// One load, as [`Book::load`].
    #[track_caller]
    pub fn requests(&self, version: &str, header: Option<&str>) -> Load {
        let address = self.namespace.value("svc/app", ".spec.clusterIP");
        let address = format!("{address}:80");
        self.book
            .load(self.cluster, &address, FLOWS, PER_SECOND, version, header)
    }

    /// Waits until all that is sent of mine reaches the laptop, and says from when on it does, in milliseconds since 1970.
    /// Something must be under way all the time.
    #[track_caller]
    pub fn until_mine_return(&self, limit: Duration) -> u64 {
        let (back, took) = eventually("mine reach the laptop alone", limit, || {
            let since = now();
            self.book.see_sent(60);
            let holders = self.book.holders_of_mine(since);
            (holders.len() == 1 && holders.contains("laptop")).then(now)
        });
        eprintln!("back after {took:?}");
        back
    }

    /// Processes of this name in pods of the application.
    pub fn processes(&self, pods: &Pods, name: &str) -> Vec<u32> {
        let path = match pods {
            Pods::All => ".items[*].metadata.uid",
            Pods::First => ".items[0].metadata.uid",
        };
        let uids = self.namespace.value("pods", path);
        self.cluster.processes_of_pods(&uids, name)
    }

    /// Ends the load, and joins the ledgers. `excused` are the times at which the application may have had mine.
    #[track_caller]
    pub fn report(&self, load: Vec<Load>, excused: impl IntoIterator<Item = Range<u64>>) -> Report {
        load.into_iter().for_each(Load::finish);
        let expected = Expectation {
            mine: "laptop".into(),
            others: "app".into(),
            deadline: DEADLINE,
            excused: excused.into_iter().collect(),
        };
        let report = self.book.report(&expected);
        eprintln!(
            "seed {}: {:?}, {} mine, {} fallbacks",
            self.seed, report.counts, report.mine, report.fallbacks
        );
        report
    }
}

/// Which of the application's pods.
#[derive(Clone, Copy, Debug)]
pub enum Pods {
    /// All of them.
    All,
    /// One, always the same.
    First,
}

/// Sends a signal, by its name with a dash.
#[track_caller]
pub fn signal(signal: &str, pid: u32) {
    tool(Command::new("kill").args([signal, &pid.to_string()]));
}

/// Kills what is still there, since some end with others, and waits until all are dead: a process that gets no processor
/// ends what it is about to do in the kernel before it dies.
#[track_caller]
pub fn kill_all(pids: &[u32]) {
    let words = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg("-KILL").args(words).output();
    let lives = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        // Behind the name, which may have anything in it, stands the state (proc_pid_stat(5)).
        stat.is_ok_and(|stat| {
            !stat
                .rsplit(") ")
                .next()
                .is_some_and(|rest| rest.starts_with('Z'))
        })
    };
    eventually("all of them are dead", Duration::from_secs(10), || {
        (!pids.iter().any(lives)).then_some(())
    });
}
