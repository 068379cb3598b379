# Makes the base layer in ./upper, without the documentation that container images leave out.
mmdebstrap --quiet --mode=root --variant=minbase --include=ca-certificates \
  --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
  --setup-hook='cp "$APT_CONF" "$1/etc/apt/apt.conf.d/00host"' \
  --customize-hook='rm "$1/etc/apt/apt.conf.d/00host"' \
  --customize-hook='printf "#!/bin/sh\nexit 101\n" > "$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"' \
  --customize-hook='mkdir -p "$1"/usr/share/man/man1 "$1"/usr/share/man/man5 "$1"/usr/share/man/man7 "$1"/usr/share/man/man8' \
  --customize-hook='rm -f "$1"/var/log/*.log "$1"/var/log/apt/* "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/var/cache/ldconfig/aux-cache; : > "$1/etc/machine-id"' \
  "$SUITE" upper "$MIRROR"
