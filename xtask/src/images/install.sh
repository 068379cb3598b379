# Installs $PACKAGES in an overlay over the parents $LOWER and leaves the difference in ./upper.
mount -t overlay overlay merged \
  -o "lowerdir=$LOWER,upperdir=upper,workdir=work,redirect_dir=off,metacopy=off,index=off,xino=off"
mount --bind "$CACHE/debs" merged/var/cache/apt/archives
mount --bind "$CACHE/lists" merged/var/lib/apt/lists
mount -t proc proc merged/proc
mount --bind /dev merged/dev
cp /etc/resolv.conf merged/etc/resolv.conf
cp "$APT_CONF" merged/var/cache/apt/archives/host.conf
export APT_CONFIG=/var/cache/apt/archives/host.conf
chroot merged apt-get -qq update
# update-alternatives fails without these.
mkdir -p merged/usr/share/man/man1 merged/usr/share/man/man7
chroot merged apt-get -qq -y --no-install-recommends -o APT::Keep-Downloaded-Packages=true \
  -o Dpkg::Options::=--force-unsafe-io -o APT::Sandbox::User=root install $PACKAGES
chroot merged /bin/sh -ec "$HOOK"
umount merged/dev merged/proc merged/var/lib/apt/lists merged/var/cache/apt/archives
chroot merged /bin/sh -ec '
  rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/*.log /var/cache/ldconfig/aux-cache \
    /var/cache/debconf/*-old /var/lib/dpkg/*-old /etc/*- /tmp/* /var/tmp/* /root/.cache /etc/resolv.conf \
    /etc/ssl/private/ssl-cert-snakeoil.key'
umount merged
