//! Who runs in the container: the image's `User`, looked up in the image's own accounts.

use super::SandboxError;

/// `/etc/passwd` and `/etc/group` of an image, as they are; empty where there are none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accounts<'a> {
    /// `name:password:uid:gid:comment:home:shell` lines.
    pub passwd: &'a [u8],
    /// `name:password:gid:member,member` lines.
    pub group: &'a [u8],
}

/// The ids a process runs under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

impl Accounts<'_> {
    /// Whether [`identity`](Self::identity) of this `User` looks into the accounts: root needs none.
    pub fn needed(user: &str) -> bool {
        !matches!(user, "" | "0" | "root" | "0:0" | "root:root")
    }

    /// Resolves `user`, `user:group`, each a name or a number (image specification, "User").
    pub fn identity(&self, user: &str) -> Result<Identity, SandboxError> {
        if !Self::needed(user) {
            return Ok(Identity { uid: 0, gid: 0, groups: Vec::new(), home: "/root".into() });
        }
        let unknown =
            |kind: &str, name: &str| SandboxError::Configuration(format!("the image has no {kind} {name:?}"));
        let (user, group) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
        let account = lines(self.passwd).find(|f| f.len() >= 6 && (f[0] == user || f[2] == user));
        let uid = match (user.parse(), &account) {
            (Ok(uid), _) => uid,
            (_, Some(f)) => f[2].parse().map_err(|_| unknown("user", user))?,
            _ => return Err(unknown("user", user)),
        };
        let by_name =
            |name: &str| lines(self.group).find(|f| f.len() >= 3 && f[0] == name)?.get(2)?.parse().ok();
        let gid = match (group, &account) {
            (Some(group), _) => {
                group.parse().ok().or_else(|| by_name(group)).ok_or_else(|| unknown("group", group))?
            }
            (None, Some(f)) => f[3].parse().unwrap_or(0),
            (None, None) => 0,
        };
        // An explicit group replaces the memberships, as with docker.
        let name = account.as_ref().map_or(user, |f| f[0]);
        let member = |f: &Vec<&str>| f.len() >= 4 && f[3].split(',').any(|m| m == name);
        let groups = match group {
            Some(_) => Vec::new(),
            None => lines(self.group).filter(member).filter_map(|f| f[2].parse().ok()).collect(),
        };
        let home = account.map_or("/", |f| f[5]).to_owned();
        Ok(Identity { uid, gid, groups, home })
    }
}

/// Fields of each line that is text.
fn lines(file: &[u8]) -> impl Iterator<Item = Vec<&str>> {
    file.split(|b| *b == b'\n').filter_map(|l| std::str::from_utf8(l).ok()).map(|l| l.split(':').collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbad line\n\xff:x:1:1::/:\nredis:x:101:103::/var/lib/redis:/x\n";
    const GROUP: &[u8] = b"root:x:0:\nredis:x:103:\nssl:x:44:www,redis\n";

    fn identity(user: &str) -> Result<Identity, SandboxError> {
        Accounts { passwd: PASSWD, group: GROUP }.identity(user)
    }

    #[test]
    fn users_and_groups_by_name_and_number() {
        let is = |user: &str, uid, gid, groups: &[u32], home: &str| {
            let wanted = Identity { uid, gid, groups: groups.to_vec(), home: home.into() };
            assert_eq!(identity(user).unwrap(), wanted, "{user}");
        };
        is("", 0, 0, &[], "/root");
        is("redis", 101, 103, &[44], "/var/lib/redis");
        is("101", 101, 103, &[44], "/var/lib/redis");
        is("redis:ssl", 101, 44, &[], "/var/lib/redis");
        is("5:6", 5, 6, &[], "/");
        is("5", 5, 0, &[], "/");
        assert!(identity("nobody").is_err() && identity("redis:nogroup").is_err());
    }
}
