//! The files that a program in the namespace sees in place of the workstation's.
//!
//! They lie in a tmpfs that only the namespace has, bind-mounted one by one, so nothing on a disk changes and nothing is
//! left. Knows nothing of networks.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

use super::device::{ADDRESS, ADDRESS_V6};

/// Folders that every system has; one is covered for a moment, while the files are made.
const WORKSHOPS: [&str; 4] = ["/tmp", "/var", "/mnt", "/opt"];

/// Sockets that resolvers ask instead of `/etc/resolv.conf`: nscd, and systemd-resolved behind nss-resolve.
const RESOLVER_SOCKETS: [&str; 3] = [
    "/run/nscd/socket",
    "/var/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
];

/// Folders whose files ssh takes only from root or the user. Root's have an unknown owner in the namespace.
const SSH_FOLDERS: [&str; 2] = ["/etc/ssh/ssh_config.d", "/usr/lib/systemd/ssh_config.d"];

/// Puts the files in place. Gives `/etc/resolv.conf`, still empty, and what could not be done.
///
/// # Errors
/// There is no place to mount files, or no `/etc/resolv.conf` to replace.
pub(super) fn put_in_place() -> io::Result<(File, Vec<String>)> {
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", private)?;
    let workshop = Workshop::open()?;
    let resolv_conf = workshop.file("resolv.conf", "")?;
    mount_bind(workshop.path("resolv.conf"), "/etc/resolv.conf")?;
    let mut notes = Vec::new();
    let mut optional = |what: &str, done: io::Result<()>| match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            notes.push(format!("{what}: {error}"));
        }
        Ok(()) | Err(_) => {}
    };
    optional("/etc/hosts stays the workstation's", hosts(&workshop));
    workshop.file("nothing", "")?;
    for socket in RESOLVER_SOCKETS {
        let hidden = cover(&workshop.path("nothing"), Path::new(socket));
        optional(&format!("{socket} stays reachable"), hidden);
    }
    for (number, folder) in SSH_FOLDERS.into_iter().enumerate() {
        let copied = copy_folder(&workshop, &format!("ssh-{number}"), Path::new(folder));
        optional(&format!("ssh will refuse {folder}"), copied);
    }
    workshop.close()?;
    Ok((resolv_conf, notes))
}

fn hosts(workshop: &Workshop) -> io::Result<()> {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    workshop.file("hosts", &hosts_text(&name))?;
    cover(&workshop.path("hosts"), Path::new("/etc/hosts"))
}

/// As the kubelet writes it for a pod.
fn hosts_text(name: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         {ADDRESS}\t{name}\n\
         {ADDRESS_V6}\t{name}\n"
    )
}

fn cover(with: &Path, target: &Path) -> io::Result<()> {
    fs::symlink_metadata(target)?;
    Ok(mount_bind(with, target)?)
}

fn copy_folder(workshop: &Workshop, name: &str, folder: &Path) -> io::Result<()> {
    let entries = fs::read_dir(folder)?;
    fs::create_dir(workshop.path(name))?;
    for entry in entries {
        let entry = entry?;
        if let Ok(text) = fs::read(entry.path()) {
            fs::write(workshop.path(name).join(entry.file_name()), text)?;
        }
    }
    cover(&workshop.path(name), folder)
}

/// A tmpfs at a place that it covers only until it is closed; what was bound from it stays.
struct Workshop(&'static str);

impl Workshop {
    fn open() -> io::Result<Self> {
        let mut failure = io::ErrorKind::NotFound.into();
        for place in WORKSHOPS {
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            match mount("tmpfs", place, "tmpfs", flags, c"mode=0755,size=1m") {
                Ok(()) => return Ok(Self(place)),
                Err(error) => failure = error.into(),
            }
        }
        Err(failure)
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.0).join(name)
    }

    fn file(&self, name: &str, text: &str) -> io::Result<File> {
        let mut file = File::create(self.path(name))?;
        file.write_all(text.as_bytes())?;
        Ok(file)
    }

    fn close(self) -> io::Result<()> {
        Ok(unmount(self.0, UnmountFlags::DETACH)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_name_leads_to_the_own_addresses() {
        let text = hosts_text("ada-laptop");

        assert!(text.contains("198.18.0.1\tada-laptop\n"), "{text}");
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"), "{text}");
    }
}
