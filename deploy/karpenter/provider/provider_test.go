package provider

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/awslabs/operatorpkg/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	karpenter "sigs.k8s.io/karpenter/pkg/apis/v1"
	"sigs.k8s.io/karpenter/pkg/cloudprovider"

	"spindrift.dev/karpenter/api"
	"spindrift.dev/karpenter/driver"
)

const (
	cell   = "cell-1"
	memory = time.Minute
)

// cloud serves the driver's contract from memory, over a Unix socket as the lab's does.
type cloud struct {
	mutex     sync.Mutex
	shapes    []driver.Shape
	instances map[string]driver.Instance
	orders    []driver.Order
	// Shape and zone that are refused.
	soldOut map[string]bool
	// How many answers are lost after the work was done.
	lost int
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	refuse := func(code int, kind string) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]string{"code": kind, "message": "of the test"})
	}
	name := strings.TrimPrefix(r.URL.Path, "/v1/instances/")
	switch {
	case r.URL.Path == "/v1/shapes":
		_ = json.NewEncoder(w).Encode(map[string]any{"shapes": c.shapes})
	case r.URL.Path == "/v1/instances":
		found := []driver.Instance{}
		for _, instance := range c.instances {
			if id := r.URL.Query().Get("providerId"); id == "" || id == instance.ProviderID {
				found = append(found, instance)
			}
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"instances": found})
	case r.Method == http.MethodPut:
		order := driver.Order{}
		if err := json.NewDecoder(r.Body).Decode(&order); err != nil {
			refuse(400, "invalid")
			return
		}
		c.orders = append(c.orders, order)
		if c.soldOut[order.Shape+" "+order.Zone] {
			refuse(429, "out_of_capacity")
			return
		}
		c.instances[name] = driver.Instance{
			Name: name, ProviderID: "test://" + name, Class: order.Class.Name, Shape: order.Shape, Zone: order.Zone,
			CapacityType: order.CapacityType, Labels: order.Labels, State: driver.Starting, CreatedAt: time.Now(),
		}
		if c.lost > 0 {
			c.lost--
			refuse(503, "unavailable")
			return
		}
		_ = json.NewEncoder(w).Encode(c.instances[name])
	default:
		instance, known := c.instances[name]
		if !known {
			refuse(404, "not_found")
			return
		}
		if r.Method == http.MethodDelete {
			instance.State = driver.Stopping
			c.instances[name] = instance
			w.WriteHeader(202)
		}
		_ = json.NewEncoder(w).Encode(instance)
	}
}

func (c *cloud) gone(name string) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	delete(c.instances, name)
}

func amounts(cpu, memory string) corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU:    resource.MustParse(cpu),
		corev1.ResourceMemory: resource.MustParse(memory),
		corev1.ResourcePods:   resource.MustParse("110"),
	}
}

func shape(name, cpu, left string, price float64) driver.Shape {
	return driver.Shape{
		Name: name, Arch: "amd64", Capacity: amounts(cpu, "4Gi"), Allocatable: amounts(left, "3Gi"),
		Offerings: []driver.Offering{
			{Zone: "zone-a", CapacityType: "on-demand", Price: price, Available: true},
			{Zone: "zone-b", CapacityType: "on-demand", Price: price, Available: true},
		},
	}
}

type bench struct {
	*testing.T
	cloud    *cloud
	kube     client.Client
	provider *Provider
	now      time.Time
}

func setUp(t *testing.T) *bench {
	t.Helper()
	b := &bench{T: t, now: time.Unix(1000, 0), cloud: &cloud{
		shapes:    []driver.Shape{shape("small", "1", "930m", 0.06), shape("medium", "2", "1930m", 0.10)},
		instances: map[string]driver.Instance{}, soldOut: map[string]bool{},
	}}
	path := filepath.Join(t.TempDir(), "driver.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: b.cloud}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	instances, err := driver.Dial("unix://"+path, "")
	if err != nil {
		t.Fatal(err)
	}
	class := &api.HostClass{ObjectMeta: metav1.ObjectMeta{Name: "standard"}, Spec: api.HostClassSpec{Class: "burst"}}
	b.kube = fake.NewClientBuilder().WithScheme(scheme.Scheme).WithObjects(class).WithStatusSubresource(class).Build()
	b.provider = New(b.kube, instances, Settings{Cell: cell, Server: "https://cell", Authority: "PEM", Memory: memory})
	b.provider.catalogue.now = func() time.Time { return b.now }
	return b
}

func (b *bench) claim(name string, requirements ...karpenter.NodeSelectorRequirementWithMinValues) *karpenter.NodeClaim {
	return &karpenter.NodeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{karpenter.NodePoolLabelKey: "host"}},
		Spec: karpenter.NodeClaimSpec{
			NodeClassRef: &karpenter.NodeClassReference{Group: api.Group, Kind: "HostClass", Name: "standard"},
			// As Karpenter's own, with what no machine says of itself.
			Requirements: append(requirements, in(karpenter.NodePoolLabelKey, "host"), in("spindrift.dev/hostclass", "standard")),
			Resources: karpenter.ResourceRequirements{Requests: corev1.ResourceList{
				corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourcePods: resource.MustParse("3"),
			}},
		},
	}
}

func in(key string, values ...string) karpenter.NodeSelectorRequirementWithMinValues {
	return karpenter.NodeSelectorRequirementWithMinValues{Key: key, Operator: corev1.NodeSelectorOpIn, Values: values}
}

func (b *bench) create(claim *karpenter.NodeClaim) *karpenter.NodeClaim {
	b.Helper()
	made, err := b.provider.Create(context.Background(), claim)
	if err != nil {
		b.Fatal(err)
	}
	return made
}

// secret is the token's of the host; nil: there is none.
func (b *bench) secret(host string) *corev1.Secret {
	b.Helper()
	secret := &corev1.Secret{}
	err := b.kube.Get(context.Background(), client.ObjectKey{Namespace: "kube-system", Name: secretName(host)}, secret)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.Fatal(err)
	}
	return secret
}

func TestANodeClaimBecomesTheCheapestInstanceThatItAllowsAndSaysWhatItIs(t *testing.T) {
	b := setUp(t)
	made := b.create(b.claim("host-1", in(corev1.LabelTopologyZone, "zone-b")))
	for key, want := range map[string]string{
		corev1.LabelInstanceTypeStable: "small",
		corev1.LabelTopologyZone:       "zone-b",
		corev1.LabelArchStable:         "amd64",
		karpenter.CapacityTypeLabelKey: "on-demand",
		api.ClassLabel:                 "burst",
	} {
		if got := made.Labels[key]; got != want {
			t.Errorf("%s is %q, not %q", key, got, want)
		}
	}
	if made.Status.ProviderID != "test://host-1" {
		t.Error(made.Status.ProviderID)
	}
	if cpu := made.Status.Allocatable[corev1.ResourceCPU]; cpu.String() != "930m" {
		t.Error(cpu)
	}
	order := b.cloud.orders[0]
	if !slices.Equal(order.Taints, []driver.Taint{{Key: "karpenter.sh/unregistered", Effect: "NoExecute"}}) {
		t.Error(order.Taints)
	}
	if order.Labels[api.CellLabel] != cell || order.Labels[karpenter.NodePoolLabelKey] != "host" {
		t.Error(order.Labels)
	}
}

func TestAShapeTooSmallForTheClaimIsNotAskedFor(t *testing.T) {
	b := setUp(t)
	claim := b.claim("host-1")
	claim.Spec.Resources.Requests[corev1.ResourceCPU] = resource.MustParse("1500m")
	if made := b.create(claim); made.Labels[corev1.LabelInstanceTypeStable] != "medium" {
		t.Error(made.Labels)
	}
}

func TestTheTokenIsForThatHostEndsSoonAndGoesWithIt(t *testing.T) {
	b := setUp(t)
	made := b.create(b.claim("host-1"))
	secret := b.secret("host-1")
	if secret == nil || secret.Type != corev1.SecretTypeBootstrapToken || secret.Annotations[api.HostAnnotation] != "host-1" {
		t.Fatalf("%+v", secret)
	}
	ends, err := time.Parse(time.RFC3339, secret.StringData["expiration"])
	if err != nil || time.Until(ends) > 16*time.Minute || time.Until(ends) < 10*time.Minute {
		t.Error(secret.StringData["expiration"], err)
	}
	if secret.StringData["auth-extra-groups"] != api.BootstrapGroup {
		t.Error(secret.StringData)
	}
	if token := secret.StringData["token-id"] + "." + secret.StringData["token-secret"]; b.cloud.orders[0].Bootstrap.Token != token {
		t.Error("the driver has another token")
	}
	if err := b.provider.Delete(context.Background(), made); err != nil {
		t.Fatal(err)
	}
	if b.secret("host-1") != nil {
		t.Error("the token outlives its host")
	}
	// It is going, and then it is over.
	if err := b.provider.Delete(context.Background(), made); err != nil {
		t.Fatal(err)
	}
	b.cloud.gone("host-1")
	if err := b.provider.Delete(context.Background(), made); !cloudprovider.IsNodeClaimNotFoundError(err) {
		t.Error(err)
	}
	if _, err := b.provider.Get(context.Background(), "test://host-1"); !cloudprovider.IsNodeClaimNotFoundError(err) {
		t.Error(err)
	}
}

func TestAnOfferingThatIsOutIsFollowedByTheNextAndNotAskedForAgainForAWhile(t *testing.T) {
	b := setUp(t)
	b.cloud.soldOut["small zone-a"] = true
	b.cloud.soldOut["small zone-b"] = true
	made := b.create(b.claim("host-1"))
	if made.Labels[corev1.LabelInstanceTypeStable] != "medium" {
		t.Fatal(made.Labels)
	}
	if len(b.cloud.orders) != 3 {
		t.Errorf("%d orders", len(b.cloud.orders))
	}
	pool := &karpenter.NodePool{}
	pool.Spec.Template.Spec.NodeClassRef = b.claim("x").Spec.NodeClassRef
	kinds, err := b.provider.GetInstanceTypes(context.Background(), pool)
	if err != nil || len(kinds) != 2 {
		t.Fatal(kinds, err)
	}
	for _, kind := range kinds {
		if available := len(kind.Offerings.Available()); (kind.Name == "small") != (available == 0) {
			t.Errorf("%s has %d offerings", kind.Name, available)
		}
	}
	b.create(b.claim("host-2"))
	if len(b.cloud.orders) != 4 {
		t.Error("it asked again at once")
	}
	b.now = b.now.Add(memory)
	b.cloud.soldOut = map[string]bool{}
	if made := b.create(b.claim("host-3")); made.Labels[corev1.LabelInstanceTypeStable] != "small" {
		t.Error("it never asks again")
	}
}

func TestWhenAllIsOutTheClaimIsToldSoAndItsTokenIsVoid(t *testing.T) {
	b := setUp(t)
	for _, one := range []string{"small zone-a", "small zone-b", "medium zone-a", "medium zone-b"} {
		b.cloud.soldOut[one] = true
	}
	for range 2 {
		_, err := b.provider.Create(context.Background(), b.claim("host-1"))
		if !cloudprovider.IsInsufficientCapacityError(err) {
			t.Fatal(err)
		}
	}
	if len(b.cloud.orders) != 4 {
		t.Errorf("%d orders", len(b.cloud.orders))
	}
	if b.secret("host-1") != nil {
		t.Error("a token for nobody is left")
	}
}

func TestACreateWhoseAnswerWasLostFindsItsInstanceAndLeavesItsTokenAlone(t *testing.T) {
	b := setUp(t)
	b.cloud.lost = 1
	claim := b.claim("host-1")
	if _, err := b.provider.Create(context.Background(), claim); err == nil || cloudprovider.IsInsufficientCapacityError(err) {
		t.Fatal(err)
	}
	before := b.secret("host-1")
	made := b.create(claim)
	if made.Status.ProviderID != "test://host-1" || len(b.cloud.orders) != 1 {
		t.Error("it was made twice")
	}
	if after := b.secret("host-1"); before == nil || after == nil || after.StringData["token-secret"] != before.StringData["token-secret"] {
		t.Error("the token that the instance has is void")
	}
}

func TestOnlyThisCellsInstancesAreListedAndThoseThatNoClaimStandsForAreEnded(t *testing.T) {
	b := setUp(t)
	claim := b.claim("host-1")
	b.create(claim)
	b.create(b.claim("host-2"))
	b.cloud.instances["host-3"] = driver.Instance{
		Name: "host-3", ProviderID: "test://host-3", Shape: "small", Zone: "zone-a", CapacityType: "on-demand",
		State: driver.Running, Labels: map[string]string{api.CellLabel: "another"},
	}
	listed, err := b.provider.List(context.Background())
	if err != nil || len(listed) != 2 {
		t.Fatal(listed, err)
	}
	if err := b.kube.Create(context.Background(), claim); err != nil {
		t.Fatal(err)
	}
	leaks := b.provider.Leaks()
	if _, err := leaks.Reconcile(context.Background()); err != nil {
		t.Fatal(err)
	}
	if b.cloud.instances["host-2"].State != driver.Starting {
		t.Error("a young one was ended: its claim may not have been seen")
	}
	leaks.now = func() time.Time { return time.Now().Add(2 * young) }
	if _, err := leaks.Reconcile(context.Background()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]driver.State{"host-1": driver.Starting, "host-2": driver.Stopping, "host-3": driver.Running} {
		if got := b.cloud.instances[name].State; got != want {
			t.Errorf("%s is %s, not %s", name, got, want)
		}
	}
}

func TestAHostHasDriftedWhenItsClassSaysSomethingElseOrNoLongerAllowsWhereItIs(t *testing.T) {
	b := setUp(t)
	made := b.create(b.claim("host-1"))
	made.Spec.NodeClassRef = b.claim("x").Spec.NodeClassRef
	drifted := func() cloudprovider.DriftReason {
		t.Helper()
		why, err := b.provider.IsDrifted(context.Background(), made)
		if err != nil {
			t.Fatal(err)
		}
		return why
	}
	if why := drifted(); why != "" {
		t.Error(why)
	}
	class := &api.HostClass{}
	change := func(to func()) {
		t.Helper()
		if err := b.kube.Get(context.Background(), client.ObjectKey{Name: "standard"}, class); err != nil {
			t.Fatal(err)
		}
		to()
		if err := b.kube.Update(context.Background(), class); err != nil {
			t.Fatal(err)
		}
	}
	change(func() { class.Spec.Zones = []string{"zone-a", "zone-b"} })
	if why := drifted(); why != "" {
		t.Error(why)
	}
	change(func() { class.Spec.Zones = []string{"zone-c"} })
	if why := drifted(); why != driftedOffering {
		t.Error(why)
	}
	change(func() { class.Spec.Parameters = map[string]string{"image": "next"} })
	if why := drifted(); why != driftedClass {
		t.Error(why)
	}
}

func TestAClassIsReadyWhenTheDriverOffersSomethingThatItAllows(t *testing.T) {
	b := setUp(t)
	classes := b.provider.Classes()
	look := func() *api.HostClass {
		t.Helper()
		class := &api.HostClass{}
		if err := b.kube.Get(context.Background(), client.ObjectKey{Name: "standard"}, class); err != nil {
			t.Fatal(err)
		}
		if _, err := classes.Reconcile(context.Background(), class); err != nil {
			t.Fatal(err)
		}
		return class
	}
	class := look()
	if !class.StatusConditions().Get(status.ConditionReady).IsTrue() || !slices.Equal(class.Status.Shapes, []string{"medium", "small"}) {
		t.Error(class.Status)
	}
	class.Spec.Shapes = []string{"huge"}
	if err := b.kube.Update(context.Background(), class); err != nil {
		t.Fatal(err)
	}
	if class = look(); !class.StatusConditions().Get(status.ConditionReady).IsFalse() {
		t.Error(class.Status)
	}
	_, err := b.provider.Create(context.Background(), b.claim("host-1"))
	if !cloudprovider.IsNodeClassNotReadyError(err) {
		t.Error(err)
	}
}

func TestTheClassesLabelAndDefinitionAreWhatTheAgentsAndTheAPIServerKnow(t *testing.T) {
	if api.CRD.Name != "hostclasses.spindrift.dev" || !karpenter.WellKnownLabels.Has("spindrift.dev/class") {
		t.Error(api.CRD.Name)
	}
	version := api.CRD.Spec.Versions[0]
	if version.Name != "v1alpha1" || version.Subresources == nil || version.Subresources.Status == nil {
		t.Error("karpenter patches the status by itself")
	}
}
