package main

import (
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// etcdCommand runs one etcd member from the server's own embed package. The
// upstream etcd main takes its flags from the global flag set, which would
// collide with those of the Kubernetes components in this binary.
func etcdCommand() *cobra.Command {
	var dataDir, client, peer string
	var noFsync bool
	command := &cobra.Command{
		Use:           "etcd",
		Short:         "Run a single etcd member",
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			clientURL, err := url.Parse(client)
			if err != nil {
				return fmt.Errorf("--listen-client-url: %w", err)
			}
			peerURL, err := url.Parse(peer)
			if err != nil {
				return fmt.Errorf("--listen-peer-url: %w", err)
			}
			config := embed.NewConfig()
			config.Name = "devcluster"
			config.Dir = dataDir
			config.LogLevel = "warn"
			config.UnsafeNoFsync = noFsync
			config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{*clientURL}, []url.URL{*clientURL}
			config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{*peerURL}, []url.URL{*peerURL}
			config.InitialCluster = config.InitialClusterFromName(config.Name)
			server, err := embed.StartEtcd(config)
			if err != nil {
				return fmt.Errorf("start etcd in %s: %w", dataDir, err)
			}
			defer server.Close()
			select {
			case <-server.Server.ReadyNotify():
			case <-time.After(time.Minute):
				return fmt.Errorf("etcd in %s was not ready within a minute", dataDir)
			}
			stop := make(chan os.Signal, 1)
			signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
			select {
			case <-stop:
				return nil
			case err := <-server.Err():
				return fmt.Errorf("etcd stopped: %w", err)
			}
		},
	}
	command.Flags().StringVar(&dataDir, "data-dir", "", "directory of the member's data")
	command.Flags().StringVar(&client, "listen-client-url", "http://127.0.0.1:2379", "URL on which clients are served")
	command.Flags().StringVar(&peer, "listen-peer-url", "http://127.0.0.1:2380", "URL on which peers would be served")
	command.Flags().BoolVar(&noFsync, "unsafe-no-fsync", false, "do not wait for the disk: for clusters that may be lost")
	cobra.CheckErr(command.MarkFlagRequired("data-dir"))
	return command
}
