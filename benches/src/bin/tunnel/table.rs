//! Results as text: medians, spread, and the ratio to the peer of the same rounds.

use std::collections::BTreeMap;
use std::process::Command;

/// One question's rounds. Rows keep the order in which they first came.
pub(crate) struct Table {
    title: String,
    base: &'static str,
    order: Vec<(String, &'static str)>,
    rounds: BTreeMap<(String, &'static str), Vec<f64>>,
}

impl Table {
    /// `base` names the row that ratios are taken to.
    pub(crate) fn new(title: &str, base: &'static str) -> Self {
        Self {
            title: title.to_owned(),
            base,
            order: Vec::new(),
            rounds: BTreeMap::new(),
        }
    }

    pub(crate) fn add(&mut self, group: impl ToString, row: &'static str, value: f64) {
        let key = (group.to_string(), row);
        if !self.rounds.contains_key(&key) {
            self.order.push(key.clone());
        }
        self.rounds.entry(key).or_default().push(value);
    }

    #[expect(clippy::print_stdout, reason = "the table is the program's data")]
    pub(crate) fn print(&self) {
        println!("\n{}", self.title);
        println!(
            "  {:<12}{:<16}{:>7}{:>12}{:>22}{:>10}",
            "", "", "rounds", "median", "min .. max", "ratio"
        );
        for key in &self.order {
            let values = sorted(&self.rounds[key]);
            let base = &self.rounds[&(key.0.clone(), self.base)];
            let ratios: Vec<f64> = self.rounds[key]
                .iter()
                .zip(base)
                .map(|(value, base)| value / base)
                .collect();
            let spread = format!("{:.0} .. {:.0}", values[0], values[values.len() - 1]);
            println!(
                "  {:<12}{:<16}{:>7}{:>12.0}{:>22}{:>10.2}",
                key.0,
                key.1,
                values.len(),
                median(&values),
                spread,
                median(&sorted(&ratios)),
            );
        }
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// What the figures belong to.
#[expect(clippy::print_stdout, reason = "the table is the program's data")]
pub(crate) fn print_machine() {
    let kernel = first_line(Command::new("uname").arg("-sr"));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let ssh = first_line(Command::new("ssh").arg("-V"));
    println!("{kernel}, {cores} cores, {ssh}, h2 0.4, rustls 0.23 (ring), mimalloc");
}

fn first_line(command: &mut Command) -> String {
    let Ok(output) = command.output() else {
        return "not installed".into();
    };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}
