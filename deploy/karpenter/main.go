// Karpenter with the cloud provider of a Spindrift pool. It runs beside the pool's
// cell, asks a host driver for machines, and never speaks to a tenant's cluster.
//
//	karpenter            what it is for
//	karpenter install    applies the definitions of its resources and ends
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/samber/lo"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	controllerruntime "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/karpenter/pkg/apis"
	"sigs.k8s.io/karpenter/pkg/cloudprovider/overlay"
	"sigs.k8s.io/karpenter/pkg/controllers"
	"sigs.k8s.io/karpenter/pkg/controllers/state"
	"sigs.k8s.io/karpenter/pkg/operator"
	"sigs.k8s.io/karpenter/pkg/operator/options"
	"sigs.k8s.io/karpenter/pkg/utils/env"

	"spindrift.dev/karpenter/api"
	"spindrift.dev/karpenter/driver"
	"spindrift.dev/karpenter/provider"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "install" {
		if err := install(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(1)
		}
		return
	}
	// Siblings prefer to be apart. Karpenter would take that for a must, and bring a
	// host for each; the scheduler spreads over the hosts that there are.
	if os.Getenv("PREFERENCE_POLICY") == "" {
		lo.Must0(os.Setenv("PREFERENCE_POLICY", string(options.PreferencePolicyIgnore)))
	}
	settings := &settings{}
	options.Injectables = append(options.Injectables, settings)
	ctx, op := operator.NewOperator()
	instances := lo.Must(driver.Dial(settings.driver, settings.driverToken))
	server, authority := lo.Must2(settings.bootstrap(op.GetConfig()))
	cell := lo.Must(cellID(ctx, op.GetAPIReader()))
	hosts := provider.New(op.GetClient(), instances, provider.Settings{
		Cell: cell, Server: server, Authority: authority, Memory: settings.memory,
	})
	decorated := overlay.Decorate(hosts, op.GetClient(), op.InstanceTypeStore)
	cluster := state.NewCluster(op.Clock, op.GetClient(), decorated)
	op.
		WithControllers(ctx, controllers.NewControllers(
			ctx, op.Manager, op.Clock, op.GetClient(), op.EventRecorder, decorated, hosts, cluster, op.InstanceTypeStore,
		)...).
		WithControllers(ctx, hosts.Classes(), hosts.Leaks()).
		Start(ctx)
}

// settings are flags beside Karpenter's own, or variables of the environment.
type settings struct {
	driver, driverToken    string
	cellServer, cellCAFile string
	memory                 time.Duration
}

func (s *settings) AddFlags(flags *options.FlagSet) {
	flags.StringVar(&s.driver, "driver", os.Getenv("SPINDRIFT_DRIVER"), "Where the host driver serves: unix:///PATH or https://HOST[:PORT]")
	flags.StringVar(&s.driverToken, "driver-token-file", os.Getenv("SPINDRIFT_DRIVER_TOKEN_FILE"), "A file with the bearer token that the driver asks for")
	flags.DurationVar(&s.memory, "out-of-capacity-memory", env.WithDefaultDuration("SPINDRIFT_OUT_OF_CAPACITY_MEMORY", 3*time.Minute), "How long what the driver was out of is not asked for again")
	flags.StringVar(&s.cellServer, "cell-server", os.Getenv("SPINDRIFT_CELL_SERVER"), "How hosts reach the cell's API server; as this process does unless it is said")
	flags.StringVar(&s.cellCAFile, "cell-ca-file", os.Getenv("SPINDRIFT_CELL_CA_FILE"), "The cell's authority as hosts are to believe it, PEM; as this process does unless it is said")
}

func (s *settings) Parse(flags *options.FlagSet, args ...string) error {
	err := flags.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err == nil && s.driver == "" {
		err = errors.New("--driver is missing: where the host driver serves")
	}
	return err
}

func (s *settings) ToContext(ctx context.Context) context.Context { return ctx }

// bootstrap is the cell's URL and authority for hosts that join.
func (s *settings) bootstrap(config *rest.Config) (string, string, error) {
	server := s.cellServer
	if server == "" {
		server = config.Host
	}
	authority, file := config.CAData, config.CAFile
	if s.cellCAFile != "" {
		authority, file = nil, s.cellCAFile
	}
	if len(authority) == 0 {
		if file == "" {
			return "", "", errors.New("hosts could not tell the cell from another: say --cell-ca-file")
		}
		read, err := os.ReadFile(file)
		if err != nil {
			return "", "", fmt.Errorf("the cell's authority: %w", err)
		}
		authority = read
	}
	return server, string(authority), nil
}

// cellID tells this cell's instances from those of another that has the same driver.
func cellID(ctx context.Context, reader client.Reader) (string, error) {
	namespace := &corev1.Namespace{}
	err := reader.Get(ctx, client.ObjectKey{Name: metav1.NamespaceSystem}, namespace)
	if err != nil {
		return "", fmt.Errorf("which cell this is: %w", err)
	}
	return string(namespace.UID), nil
}

func install(ctx context.Context) error {
	scheme := runtime.NewScheme()
	if err := apiextensionsv1.AddToScheme(scheme); err != nil {
		return err
	}
	config, err := controllerruntime.GetConfig()
	if err != nil {
		return err
	}
	kube, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return err
	}
	for _, definition := range append([]*apiextensionsv1.CustomResourceDefinition{api.CRD}, apis.CRDs...) {
		object := definition.DeepCopy()
		object.SetGroupVersionKind(apiextensionsv1.SchemeGroupVersion.WithKind("CustomResourceDefinition"))
		//nolint:staticcheck // The typed apply needs generated configurations.
		err := kube.Patch(ctx, object, client.Apply, client.FieldOwner("spindrift-karpenter"), client.ForceOwnership)
		if err != nil {
			return fmt.Errorf("applying %s: %w", object.Name, err)
		}
	}
	return nil
}
